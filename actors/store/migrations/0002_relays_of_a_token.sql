-- A relay goes with the token by which it joined, as everything else goes with what it refers to.

ALTER TABLE relay
    DROP CONSTRAINT relay_token_id_reference,
    ADD CONSTRAINT relay_token_id_reference
        FOREIGN KEY (token_id, token_kind) REFERENCES token (id, kind) ON DELETE CASCADE;
CREATE INDEX relay_by_token ON relay (token_id);
