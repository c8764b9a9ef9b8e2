-- Why a flow ended, and of how many flows a row tells the end. What was reported before these were
-- known were flows that had ended.
ALTER TABLE flow_log
    ADD COLUMN ending text NOT NULL DEFAULT '' CHECK (ending ~ '^[a-z_]{0,32}$'),
    ADD COLUMN flows bigint NOT NULL DEFAULT 1 CHECK (flows >= 0);
