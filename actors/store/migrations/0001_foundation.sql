-- The foundation: accounts and what is in them, the change log, leases, authorisations, relays.
--
-- Conventions (docs/database.md): every row of an account has account_id, references are
-- (account_id, id) pairs, row-level security is forced. Constraints are named
-- <table>_<field>_unique, _reference or _check: the store reads the field off the name.
-- SQL supplies no id, no instant and no random value; the clock of leases is the one exception.

-- --- scopes: what a transaction says about itself with set_config(..., true) ---------------------

CREATE FUNCTION scope_account() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
RETURN nullif(current_setting('holloway.account', true), '')::uuid;

CREATE FUNCTION scope_token() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
RETURN nullif(current_setting('holloway.token', true), '')::uuid;

CREATE FUNCTION scope_installation() RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE
RETURN coalesce(current_setting('holloway.installation', true), '') = 'on';

CREATE FUNCTION is_printable(value text, longest integer) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN char_length(value) <= longest AND value !~ '[\u0001-\u001f\u007f]';

CREATE FUNCTION is_host(value inet) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN masklen(value) = CASE family(value) WHEN 4 THEN 32 ELSE 128 END;

-- --- accounts ------------------------------------------------------------------------------------

CREATE TABLE account (
    id uuid CONSTRAINT account_id_unique PRIMARY KEY,
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    slug text NOT NULL CONSTRAINT account_slug_unique UNIQUE
        CHECK (slug ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    disabled boolean NOT NULL,
    range_ipv4 cidr NOT NULL CHECK (family(range_ipv4) = 4),
    range_ipv6 cidr NOT NULL CHECK (family(range_ipv6) = 6),
    created_at timestamptz NOT NULL
);

-- The row that every mutation of an account locks, and that numbers its changes. It outlives the
-- account, so that a number is never given twice.
CREATE TABLE account_sequence (
    account_id uuid PRIMARY KEY,
    number bigint NOT NULL CHECK (number >= 0)
);

CREATE TABLE change (
    account_id uuid NOT NULL REFERENCES account_sequence (account_id),
    number bigint NOT NULL CHECK (number > 0),
    at timestamptz NOT NULL,
    who text NOT NULL CHECK (who <> '' AND is_printable(who, 255)),
    kind text NOT NULL CHECK (kind IN (
        'account', 'principal', 'group', 'membership', 'site', 'resource', 'policy', 'token',
        'client', 'gateway'
    )),
    entity_id uuid NOT NULL,
    before jsonb,
    after jsonb,
    PRIMARY KEY (account_id, number),
    CHECK (before IS NOT NULL OR after IS NOT NULL)
);

-- --- who -----------------------------------------------------------------------------------------

CREATE TABLE principal (
    account_id uuid NOT NULL CONSTRAINT principal_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    kind text NOT NULL CHECK (kind IN ('user', 'service_account')),
    role text NOT NULL CHECK (role IN ('admin', 'member')),
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    email text CHECK (email LIKE '%@%' AND is_printable(email, 254)),
    disabled boolean NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT principal_id_unique PRIMARY KEY (account_id, id)
);

CREATE TABLE "group" (
    account_id uuid NOT NULL CONSTRAINT group_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    kind text NOT NULL CHECK (kind IN ('static', 'everyone')),
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    created_at timestamptz NOT NULL,
    CONSTRAINT group_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT group_name_unique UNIQUE (account_id, name)
);
CREATE UNIQUE INDEX group_kind_unique ON "group" (account_id) WHERE kind = 'everyone';

CREATE TABLE membership (
    account_id uuid NOT NULL CONSTRAINT membership_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    group_id uuid NOT NULL,
    principal_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT membership_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT membership_principal_id_unique UNIQUE (account_id, group_id, principal_id),
    CONSTRAINT membership_group_id_reference
        FOREIGN KEY (account_id, group_id) REFERENCES "group" (account_id, id),
    CONSTRAINT membership_principal_id_reference
        FOREIGN KEY (account_id, principal_id) REFERENCES principal (account_id, id)
);
CREATE INDEX membership_by_principal ON membership (account_id, principal_id);

-- --- what ----------------------------------------------------------------------------------------

CREATE TABLE site (
    account_id uuid NOT NULL CONSTRAINT site_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    created_at timestamptz NOT NULL,
    CONSTRAINT site_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT site_name_unique UNIQUE (account_id, name)
);

CREATE TABLE resource (
    account_id uuid NOT NULL CONSTRAINT resource_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    site_id uuid NOT NULL,
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    kind text NOT NULL CHECK (kind IN ('cidr', 'ip')),
    address text NOT NULL,
    filters jsonb NOT NULL CHECK (
        jsonb_typeof(filters) = 'array' AND jsonb_array_length(filters) <= 64
    ),
    created_at timestamptz NOT NULL,
    CONSTRAINT resource_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT resource_name_unique UNIQUE (account_id, name),
    CONSTRAINT resource_site_id_reference
        FOREIGN KEY (account_id, site_id) REFERENCES site (account_id, id),
    CONSTRAINT resource_address_check CHECK (
        CASE kind WHEN 'cidr' THEN address::cidr IS NOT NULL ELSE is_host(address::inet) END
    )
);
CREATE INDEX resource_by_site ON resource (account_id, site_id);

CREATE TABLE policy (
    account_id uuid NOT NULL CONSTRAINT policy_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    group_id uuid NOT NULL,
    resource_id uuid NOT NULL,
    conditions jsonb NOT NULL CHECK (jsonb_typeof(conditions) = 'object'),
    disabled boolean NOT NULL,
    description text NOT NULL CHECK (char_length(description) <= 1024),
    expires_at timestamptz,
    lease_s integer NOT NULL CHECK (lease_s BETWEEN 60 AND 86400),
    created_at timestamptz NOT NULL,
    CONSTRAINT policy_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT policy_group_id_reference
        FOREIGN KEY (account_id, group_id) REFERENCES "group" (account_id, id),
    CONSTRAINT policy_resource_id_reference
        FOREIGN KEY (account_id, resource_id) REFERENCES resource (account_id, id)
);
CREATE INDEX policy_by_group ON policy (account_id, group_id);
CREATE INDEX policy_by_resource ON policy (account_id, resource_id);

-- --- tokens: of accounts, and (without account_id) of the installation ---------------------------

CREATE TABLE token (
    account_id uuid CONSTRAINT token_account_id_reference REFERENCES account (id),
    id uuid CONSTRAINT token_id_unique PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('client', 'gateway', 'relay', 'api', 'operator')),
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    principal_id uuid,
    site_id uuid,
    expires_at timestamptz,
    max_uses integer CHECK (max_uses >= 1),
    allowed_sources jsonb NOT NULL CHECK (
        jsonb_typeof(allowed_sources) = 'array' AND jsonb_array_length(allowed_sources) <= 100
    ),
    approves_devices boolean NOT NULL,
    created_at timestamptz NOT NULL,
    uses integer NOT NULL DEFAULT 0 CHECK (uses >= 0),
    last_used_at timestamptz,
    UNIQUE (account_id, id),
    UNIQUE (id, kind),
    CONSTRAINT token_account_id_check
        CHECK ((account_id IS NULL) = (kind IN ('relay', 'operator'))),
    CONSTRAINT token_principal_id_check
        CHECK ((principal_id IS NOT NULL) = (kind IN ('client', 'api'))),
    CONSTRAINT token_site_id_check CHECK ((site_id IS NOT NULL) = (kind = 'gateway')),
    CONSTRAINT token_principal_id_reference
        FOREIGN KEY (account_id, principal_id) REFERENCES principal (account_id, id),
    CONSTRAINT token_site_id_reference
        FOREIGN KEY (account_id, site_id) REFERENCES site (account_id, id)
);
CREATE INDEX token_by_principal ON token (account_id, principal_id);
CREATE INDEX token_by_site ON token (account_id, site_id);

-- --- agents --------------------------------------------------------------------------------------

CREATE TABLE client (
    account_id uuid NOT NULL CONSTRAINT client_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    principal_id uuid NOT NULL,
    token_id uuid NOT NULL,
    device_key bytea NOT NULL CHECK (octet_length(device_key) = 32),
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    ipv4 inet NOT NULL CHECK (family(ipv4) = 4 AND is_host(ipv4)),
    ipv6 inet NOT NULL CHECK (family(ipv6) = 6 AND is_host(ipv6)),
    verified boolean NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT client_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT client_device_key_unique UNIQUE (account_id, device_key),
    CONSTRAINT client_principal_id_reference
        FOREIGN KEY (account_id, principal_id) REFERENCES principal (account_id, id),
    CONSTRAINT client_token_id_reference
        FOREIGN KEY (account_id, token_id) REFERENCES token (account_id, id)
);
CREATE INDEX client_by_principal ON client (account_id, principal_id);
CREATE INDEX client_by_token ON client (account_id, token_id);

CREATE TABLE gateway (
    account_id uuid NOT NULL CONSTRAINT gateway_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    site_id uuid NOT NULL,
    token_id uuid NOT NULL,
    device_key bytea NOT NULL CHECK (octet_length(device_key) = 32),
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    ipv4 inet NOT NULL CHECK (family(ipv4) = 4 AND is_host(ipv4)),
    ipv6 inet NOT NULL CHECK (family(ipv6) = 6 AND is_host(ipv6)),
    approved boolean NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT gateway_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT gateway_device_key_unique UNIQUE (account_id, device_key),
    CONSTRAINT gateway_site_id_reference
        FOREIGN KEY (account_id, site_id) REFERENCES site (account_id, id),
    CONSTRAINT gateway_token_id_reference
        FOREIGN KEY (account_id, token_id) REFERENCES token (account_id, id)
);
CREATE INDEX gateway_by_site ON gateway (account_id, site_id);
CREATE INDEX gateway_by_token ON gateway (account_id, token_id);

-- One holder for each tunnel address, be it client or gateway. Kept by the triggers below alone:
-- they run with the owner's rights (under the same row-level security), the application has none.
CREATE TABLE tunnel_address (
    account_id uuid NOT NULL,
    address inet NOT NULL,
    PRIMARY KEY (account_id, address)
);

CREATE FUNCTION hold_address(holder text, field text, account uuid, wanted inet, range cidr)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT wanted << range AND wanted <> range THEN
        RAISE check_violation USING
            MESSAGE = 'a tunnel address lies outside of the account''s range',
            TABLE = holder, CONSTRAINT = format('%s_%s_check', holder, field);
    END IF;
    INSERT INTO tunnel_address VALUES (account, wanted);
EXCEPTION WHEN unique_violation THEN
    RAISE unique_violation USING
        MESSAGE = 'a tunnel address is taken',
        TABLE = holder, CONSTRAINT = format('%s_%s_unique', holder, field);
END $$;

CREATE FUNCTION hold_addresses() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = holloway, pg_temp AS $$
DECLARE
    ranges record;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM tunnel_address
        WHERE account_id = OLD.account_id AND address IN (OLD.ipv4, OLD.ipv6);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        SELECT range_ipv4, range_ipv6 INTO ranges FROM account WHERE id = NEW.account_id;
        PERFORM hold_address(TG_TABLE_NAME, 'ipv4', NEW.account_id, NEW.ipv4, ranges.range_ipv4);
        PERFORM hold_address(TG_TABLE_NAME, 'ipv6', NEW.account_id, NEW.ipv6, ranges.range_ipv6);
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER tunnel_addresses AFTER INSERT OR UPDATE OR DELETE ON client
FOR EACH ROW EXECUTE FUNCTION hold_addresses();
CREATE TRIGGER tunnel_addresses AFTER INSERT OR UPDATE OR DELETE ON gateway
FOR EACH ROW EXECUTE FUNCTION hold_addresses();

CREATE FUNCTION keep_ranges() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = holloway, pg_temp AS $$
DECLARE
    outside inet;
BEGIN
    SELECT address INTO outside FROM tunnel_address
    WHERE account_id = NEW.id AND NOT address <<= NEW.range_ipv4 AND NOT address <<= NEW.range_ipv6
    ORDER BY family(address) LIMIT 1;
    IF FOUND THEN
        RAISE check_violation USING
            MESSAGE = 'a tunnel address in use lies outside of the new range',
            TABLE = 'account', CONSTRAINT = format('account_range_ipv%s_check', family(outside));
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER keep_ranges AFTER UPDATE OF range_ipv4, range_ipv6 ON account
FOR EACH ROW EXECUTE FUNCTION keep_ranges();

-- --- authorisations ------------------------------------------------------------------------------

-- No reference to policy, client, gateway, resource or token: the row is also the record of who
-- reached what, and outlives them. Its writer is fenced by the epoch of the account's lease.
CREATE TABLE "authorization" (
    account_id uuid NOT NULL
        CONSTRAINT authorization_account_id_reference REFERENCES account (id) ON DELETE CASCADE,
    id uuid NOT NULL,
    policy_id uuid NOT NULL,
    client_id uuid NOT NULL,
    gateway_id uuid NOT NULL,
    resource_id uuid NOT NULL,
    token_id uuid NOT NULL,
    connection_id uuid NOT NULL,
    remote_ip inet NOT NULL CHECK (is_host(remote_ip)),
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    ended_at timestamptz,
    end_reason text NOT NULL CHECK (is_printable(end_reason, 255)),
    CONSTRAINT authorization_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT authorization_expires_at_check CHECK (expires_at >= created_at),
    CONSTRAINT authorization_ended_at_check CHECK (ended_at IS NOT NULL OR end_reason = '')
);
CREATE INDEX authorization_live ON "authorization" (account_id, expires_at) WHERE ended_at IS NULL;

-- --- the installation ----------------------------------------------------------------------------

-- Who owns an account's actor. The epoch only grows, also over the account's removal.
CREATE TABLE lease (
    account_id uuid PRIMARY KEY REFERENCES account_sequence (account_id),
    epoch bigint NOT NULL CHECK (epoch > 0),
    owner text NOT NULL,
    acquired_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE relay (
    id uuid CONSTRAINT relay_id_unique PRIMARY KEY,
    token_id uuid NOT NULL,
    token_kind text NOT NULL GENERATED ALWAYS AS ('relay') STORED,
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    region text NOT NULL CHECK (is_printable(region, 64)),
    addresses jsonb NOT NULL CHECK (
        jsonb_typeof(addresses) = 'array' AND jsonb_array_length(addresses) <= 16
    ),
    last_seen_at timestamptz NOT NULL,
    CONSTRAINT relay_token_id_reference
        FOREIGN KEY (token_id, token_kind) REFERENCES token (id, kind)
);

-- --- the feed: a wake-up for each transaction that made changes ----------------------------------

CREATE FUNCTION wake_feed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('holloway_changes', NEW.account_id::text);
    RETURN NULL;
END $$;

CREATE TRIGGER wake_feed AFTER UPDATE OF number ON account_sequence
FOR EACH ROW EXECUTE FUNCTION wake_feed();

-- --- walls: forced row-level security, and no right that is not needed ---------------------------

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA holloway FROM PUBLIC;
GRANT USAGE ON SCHEMA holloway TO holloway_application, holloway_feed;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA holloway TO holloway_application;

DO $$
DECLARE
    entity text;
    columns text;
BEGIN
    FOREACH entity IN ARRAY ARRAY[
        'principal', 'group', 'membership', 'site', 'resource', 'policy', 'token', 'client',
        'gateway', 'tunnel_address', 'change', 'authorization', 'account_sequence', 'lease'
    ] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', entity);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', entity);
        EXECUTE format(
            'CREATE POLICY own_account ON %I USING (account_id = scope_account())', entity
        );
    END LOOP;

    -- Ids and accounts of rows never change: no right to update those columns.
    FOREACH entity IN ARRAY ARRAY[
        'account', 'principal', 'group', 'membership', 'site', 'resource', 'policy', 'token',
        'client', 'gateway', 'authorization', 'relay'
    ] LOOP
        SELECT string_agg(quote_ident(attname), ', ') INTO columns FROM pg_attribute
        WHERE attrelid = format('%I', entity)::regclass AND attnum > 0
            AND attgenerated = '' AND attname NOT IN ('id', 'account_id');
        EXECUTE format('GRANT SELECT, INSERT, UPDATE (%s) ON %I TO holloway_application',
                       columns, entity);
        IF entity NOT IN ('authorization', 'relay') THEN
            EXECUTE format('GRANT DELETE ON %I TO holloway_application', entity);
        END IF;
    END LOOP;
END $$;

ALTER TABLE account ENABLE ROW LEVEL SECURITY;
ALTER TABLE account FORCE ROW LEVEL SECURITY;
CREATE POLICY own_account ON account USING (id = scope_account());
CREATE POLICY operators_list ON account FOR SELECT USING (scope_installation());

-- A token is found before its account is known, by whoever names its id.
CREATE POLICY find_by_id ON token FOR SELECT USING (id = scope_token());
CREATE POLICY use_by_id ON token FOR UPDATE USING (id = scope_token());
CREATE POLICY installation ON token
USING (account_id IS NULL AND scope_installation());

ALTER TABLE relay ENABLE ROW LEVEL SECURITY;
ALTER TABLE relay FORCE ROW LEVEL SECURITY;
CREATE POLICY installation ON relay USING (scope_installation());

CREATE POLICY follow ON account_sequence FOR SELECT TO holloway_feed USING (true);

GRANT SELECT, INSERT ON change TO holloway_application;
GRANT SELECT, INSERT, UPDATE (number) ON account_sequence TO holloway_application;
GRANT SELECT, INSERT, UPDATE (epoch, owner, acquired_at) ON lease TO holloway_application;
GRANT SELECT ON account_sequence TO holloway_feed;
