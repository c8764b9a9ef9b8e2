-- The nodes of the cluster, and which life of which node owns an account's actor.
--
-- A lease is compared with clock_timestamp(), never now(): a transaction may have waited for a lock.

-- The row that every join locks, and that numbers the lives of nodes. It outlives them, so that an
-- incarnation is never given twice.
CREATE TABLE node_sequence (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    incarnation bigint NOT NULL CHECK (incarnation > 0)
);

CREATE TABLE node (
    name text CONSTRAINT node_name_unique PRIMARY KEY
        CONSTRAINT node_name_check CHECK (name ~ '^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$'),
    incarnation bigint NOT NULL CONSTRAINT node_incarnation_unique UNIQUE
        CONSTRAINT node_incarnation_check CHECK (incarnation > 0),
    link_address text NOT NULL CONSTRAINT node_link_address_check
        CHECK (link_address ~ '.:[0-9]{1,5}$' AND is_printable(link_address, 255)),
    door_address text NOT NULL CONSTRAINT node_door_address_check
        CHECK (door_address ~ '.:[0-9]{1,5}$' AND is_printable(door_address, 255)),
    version text NOT NULL CONSTRAINT node_version_check
        CHECK (version <> '' AND is_printable(version, 255)),
    draining boolean NOT NULL DEFAULT false,
    -- One value says it all: '-infinity' is a node that was given up for dead, and cannot renew.
    lease_until timestamptz NOT NULL
        CONSTRAINT node_lease_until_check CHECK (lease_until < 'infinity'),
    expelled boolean NOT NULL GENERATED ALWAYS AS (lease_until = '-infinity') STORED
);

-- `incarnation` is that of the owner, or of the last one when there is none (owner ''). It is no
-- reference: a node may go and leave accounts behind, which are free by that. 0 is from a release
-- that knew no nodes.
ALTER TABLE lease
    ADD COLUMN incarnation bigint NOT NULL DEFAULT 0
        CONSTRAINT lease_incarnation_check CHECK (incarnation >= 0),
    ADD CONSTRAINT lease_owner_check
        CHECK (owner = '' OR owner ~ '^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$');

ALTER TABLE node_sequence ENABLE ROW LEVEL SECURITY;
ALTER TABLE node_sequence FORCE ROW LEVEL SECURITY;
CREATE POLICY installation ON node_sequence USING (scope_installation());
ALTER TABLE node ENABLE ROW LEVEL SECURITY;
ALTER TABLE node FORCE ROW LEVEL SECURITY;
CREATE POLICY installation ON node USING (scope_installation());

-- Name, incarnation and addresses of a life never change: no right to update those columns.
GRANT SELECT, INSERT, UPDATE (incarnation) ON node_sequence TO holloway_application;
GRANT SELECT, INSERT, DELETE, UPDATE (draining, lease_until) ON node TO holloway_application;
GRANT UPDATE (incarnation) ON lease TO holloway_application;
