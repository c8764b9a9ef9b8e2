-- The whole domain: ways to sign in, directories, identities, tests of policies; resources at
-- several sites, names, the internet, pools of devices; settings of the account, scopes, posture.
--
-- New columns have defaults and old ones stay, so that the previous release can go on beside this.
-- What it wrote is brought up to date while row-level security does not bind us, its owner.

ALTER TABLE change
    DROP CONSTRAINT change_kind_check,
    ADD CONSTRAINT change_kind_check CHECK (kind IN (
        'account', 'principal', 'auth_provider', 'directory', 'identity', 'group', 'membership',
        'site', 'resource', 'policy', 'policy_test', 'token', 'client', 'gateway'
    ));

-- --- what jsonb may hold -------------------------------------------------------------------------

CREATE FUNCTION is_list(value jsonb, longest integer) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE jsonb_typeof(value) WHEN 'array' THEN jsonb_array_length(value) <= longest
    ELSE false END;

CREATE FUNCTION are_distinct(value uuid[]) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN array_position(value, NULL) IS NULL
    AND (SELECT count(DISTINCT each) = count(*) FROM unnest(value) each);

CREATE FUNCTION is_sealed(value jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN jsonb_typeof(value) = 'object'
    AND coalesce(value ->> 'key_id', '') ~ '^[0-9]{1,10}$'
    AND coalesce(value ->> 'box', '') ~ '^[A-Za-z0-9+/]{54,}={0,2}$'
    AND char_length(value ->> 'box') <= 10924;

CREATE FUNCTION are_limits(value jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN jsonb_typeof(value) = 'object' AND (
    SELECT coalesce(bool_and(each.value::text ~ '^(null|[0-9]{1,10})$'), true)
    FROM jsonb_each(value) each
);

CREATE FUNCTION is_retention(value jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN jsonb_typeof(value) = 'object' AND (
    SELECT coalesce(bool_and(
        each.value::text ~ '^[0-9]{1,4}$' AND each.value::text::integer BETWEEN 1 AND 3650
    ), true)
    FROM jsonb_each(value) each
);

CREATE FUNCTION are_upstreams(value jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN is_list(value, 8) AND (
    SELECT coalesce(bool_and(CASE each ->> 'kind'
        WHEN 'doh' THEN coalesce(each ->> 'address', '') ~ '^https://[^/?#@[:space:]]+([/?][^#]*)?$'
        WHEN 'do53' THEN coalesce(each ->> 'address', '')
            ~ '^([0-9.]+(:[0-9]{1,5})?|[0-9a-f:.]*:[0-9a-f:.]*|\[[0-9a-f:.]+\]:[0-9]{1,5})$'
        ELSE false END), true)
    FROM jsonb_array_elements(value) each
);

CREATE FUNCTION are_conditions(value jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN jsonb_typeof(value) = 'object' AND (
    SELECT coalesce(bool_and(
        each.key IN ('remote_ip_location_region', 'remote_ip', 'auth_provider', 'current_time',
                     'client_verified', 'client_posture')
        AND (each.value = 'null' OR coalesce(each.value ->> 'property', '') = each.key)
    ), true)
    FROM jsonb_each(value) each
);

CREATE FUNCTION are_scopes(value jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN is_list(value, 64) AND (
    SELECT coalesce(bool_and(
        coalesce(each #>> '{}', '') ~ '^(\*|[a-z]+(_[a-z]+)*):(read|write)$'
    ), true) AND count(DISTINCT each) = count(*)
    FROM jsonb_array_elements(value) each
);

-- A pattern of names: wildcards, but none in the top-level label, which is no number either.
CREATE FUNCTION is_dns_pattern(value text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN char_length(value) <= 253
    AND value ~ '^(\*\*\.|([a-z0-9_*?]([a-z0-9_*?-]{0,61}[a-z0-9_*?])?\.))*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$'
    AND value !~ '[^.]\*\*|\*\*[^.]'
    AND value !~ '(^|\.)[0-9]+$';

-- --- accounts ------------------------------------------------------------------------------------

-- NOT VALID: an account of the previous release may have a tunnel range that meets the ranges of
-- names that it is now given. It stays as it is until somebody changes it.
ALTER TABLE account
    ADD COLUMN names_ipv4 cidr NOT NULL DEFAULT '100.96.0.0/11' CHECK (family(names_ipv4) = 4),
    ADD COLUMN names_ipv6 cidr NOT NULL DEFAULT 'fd48:4c57:5901::/64'
        CHECK (family(names_ipv6) = 6),
    ADD COLUMN resolver_ipv4 inet NOT NULL DEFAULT '100.100.111.1'
        CHECK (family(resolver_ipv4) = 4 AND is_host(resolver_ipv4)),
    ADD COLUMN search_domain text CHECK (
        char_length(search_domain) <= 253 AND search_domain !~ '(^|\.)[0-9]+$' AND search_domain
            ~ '^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'
    ),
    ADD COLUMN dns_upstreams jsonb NOT NULL DEFAULT '[]' CHECK (are_upstreams(dns_upstreams)),
    ADD COLUMN limits jsonb NOT NULL DEFAULT '{}' CHECK (are_limits(limits)),
    ADD COLUMN retention jsonb NOT NULL DEFAULT '{}' CHECK (is_retention(retention)),
    ADD CONSTRAINT account_names_ipv4_disjoint_check CHECK (NOT names_ipv4 && range_ipv4) NOT VALID,
    ADD CONSTRAINT account_names_ipv6_disjoint_check CHECK (NOT names_ipv6 && range_ipv6) NOT VALID,
    ADD CONSTRAINT account_resolver_ipv4_disjoint_check CHECK (
        NOT set_masklen(resolver_ipv4, 24) && range_ipv4
        AND NOT names_ipv4 <<= network(set_masklen(resolver_ipv4, 24))
    ) NOT VALID;

-- --- who -----------------------------------------------------------------------------------------

CREATE TABLE auth_provider (
    account_id uuid NOT NULL CONSTRAINT auth_provider_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    kind text NOT NULL CHECK (kind IN ('oidc', 'google', 'okta', 'entra', 'email')),
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    issuer text CHECK (issuer ~ '^https://[^/?#@[:space:]]+(/[^?#]*)?$' AND is_printable(issuer, 512)),
    client_id text CHECK (client_id <> '' AND is_printable(client_id, 255)),
    client_secret jsonb CHECK (is_sealed(client_secret)),
    context text NOT NULL CHECK (context IN ('clients', 'portal', 'both')),
    client_session_s integer NOT NULL CHECK (client_session_s BETWEEN 3600 AND 7776000),
    portal_session_s integer NOT NULL CHECK (portal_session_s BETWEEN 300 AND 86400),
    disabled boolean NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT auth_provider_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT auth_provider_name_unique UNIQUE (account_id, name),
    CONSTRAINT auth_provider_issuer_kind_check CHECK ((issuer IS NOT NULL) = (kind <> 'email')),
    CONSTRAINT auth_provider_client_id_kind_check
        CHECK ((client_id IS NOT NULL) = (kind <> 'email')),
    CONSTRAINT auth_provider_client_secret_kind_check
        CHECK (client_secret IS NULL OR kind <> 'email')
);

CREATE TABLE directory (
    account_id uuid NOT NULL CONSTRAINT directory_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    kind text NOT NULL CHECK (kind IN ('google', 'okta', 'entra', 'scim')),
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    credentials jsonb CHECK (is_sealed(credentials)),
    disabled boolean NOT NULL,
    synced_at timestamptz,
    last_error text NOT NULL CHECK (is_printable(last_error, 1024)),
    created_at timestamptz NOT NULL,
    CONSTRAINT directory_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT directory_name_unique UNIQUE (account_id, name)
);

CREATE TABLE identity (
    account_id uuid NOT NULL CONSTRAINT identity_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    principal_id uuid NOT NULL,
    auth_provider_id uuid NOT NULL,
    issuer text NOT NULL CHECK (issuer <> '' AND is_printable(issuer, 512)),
    subject text NOT NULL CHECK (subject <> '' AND is_printable(subject, 255)),
    created_at timestamptz NOT NULL,
    CONSTRAINT identity_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT identity_subject_unique UNIQUE (account_id, auth_provider_id, issuer, subject),
    CONSTRAINT identity_principal_id_reference
        FOREIGN KEY (account_id, principal_id) REFERENCES principal (account_id, id),
    CONSTRAINT identity_auth_provider_id_reference
        FOREIGN KEY (account_id, auth_provider_id) REFERENCES auth_provider (account_id, id)
);
CREATE INDEX identity_by_principal ON identity (account_id, principal_id);

ALTER TABLE "group"
    ADD COLUMN directory_id uuid,
    ADD COLUMN external_id text CHECK (external_id <> '' AND is_printable(external_id, 255)),
    DROP CONSTRAINT group_kind_check,
    ADD CONSTRAINT group_kind_check CHECK (kind IN ('static', 'synced', 'everyone')),
    ADD CONSTRAINT group_directory_id_check CHECK ((directory_id IS NOT NULL) = (kind = 'synced')),
    ADD CONSTRAINT group_external_id_kind_check
        CHECK ((external_id IS NOT NULL) = (kind = 'synced')),
    ADD CONSTRAINT group_external_id_unique UNIQUE (account_id, directory_id, external_id),
    ADD CONSTRAINT group_directory_id_reference
        FOREIGN KEY (account_id, directory_id) REFERENCES directory (account_id, id);

-- --- what ----------------------------------------------------------------------------------------

ALTER TABLE site
    ADD COLUMN kind text NOT NULL DEFAULT 'static' CHECK (kind IN ('static', 'internet')),
    ADD CONSTRAINT site_id_and_kind_unique UNIQUE (account_id, id, kind);
CREATE UNIQUE INDEX site_kind_unique ON site (account_id) WHERE kind = 'internet';

ALTER TABLE resource NO FORCE ROW LEVEL SECURITY;
ALTER TABLE resource
    ADD COLUMN site_ids uuid[],
    ADD COLUMN device_ids uuid[] NOT NULL DEFAULT '{}',
    ADD COLUMN ip_stack text NOT NULL DEFAULT 'dual',
    ALTER COLUMN site_id DROP NOT NULL;
UPDATE resource SET site_ids = ARRAY[site_id];
ALTER TABLE resource
    ALTER COLUMN site_ids SET NOT NULL,
    DROP CONSTRAINT resource_kind_check,
    DROP CONSTRAINT resource_address_check,
    ADD CONSTRAINT resource_kind_check
        CHECK (kind IN ('cidr', 'ip', 'dns', 'internet', 'device_pool')),
    ADD CONSTRAINT resource_address_check CHECK (
        CASE kind
            WHEN 'cidr' THEN address::cidr IS NOT NULL
            WHEN 'ip' THEN is_host(address::inet)
            WHEN 'dns' THEN is_dns_pattern(address)
            ELSE address = ''
        END
    ),
    ADD CONSTRAINT resource_ip_stack_check
        CHECK (ip_stack = 'dual' OR (kind = 'dns' AND ip_stack IN ('v4', 'v6'))),
    ADD CONSTRAINT resource_site_ids_check CHECK (
        CASE kind
            WHEN 'device_pool' THEN cardinality(site_ids) = 0
            WHEN 'internet' THEN cardinality(site_ids) = 1
            ELSE cardinality(site_ids) BETWEEN 1 AND 8
        END AND are_distinct(site_ids)
    ),
    ADD CONSTRAINT resource_device_ids_check CHECK (
        (kind = 'device_pool' OR cardinality(device_ids) = 0)
        AND cardinality(device_ids) <= 100 AND are_distinct(device_ids)
    ),
    ADD CONSTRAINT resource_id_and_kind_unique UNIQUE (account_id, id, kind);
CREATE UNIQUE INDEX resource_kind_unique ON resource (account_id) WHERE kind = 'internet';

-- The sites of a resource and the devices of a pool as references. The arrays of `resource` hold
-- the order; these tables follow them by the trigger below alone, as tunnel_address does.
CREATE TABLE resource_site (
    account_id uuid NOT NULL,
    resource_id uuid NOT NULL,
    resource_kind text NOT NULL,
    site_id uuid NOT NULL,
    site_kind text NOT NULL,
    PRIMARY KEY (account_id, resource_id, site_id),
    CONSTRAINT resource_site_resource_id_reference
        FOREIGN KEY (account_id, resource_id, resource_kind)
        REFERENCES resource (account_id, id, kind) ON UPDATE CASCADE ON DELETE CASCADE,
    CONSTRAINT resource_site_site_id_reference
        FOREIGN KEY (account_id, site_id, site_kind)
        REFERENCES site (account_id, id, kind) ON UPDATE CASCADE,
    CONSTRAINT resource_site_kind_check
        CHECK (resource_kind <> 'internet' OR site_kind = 'internet')
);
CREATE INDEX resource_site_by_site ON resource_site (account_id, site_id);

CREATE TABLE resource_device (
    account_id uuid NOT NULL,
    resource_id uuid NOT NULL,
    device_id uuid NOT NULL,
    PRIMARY KEY (account_id, resource_id, device_id),
    CONSTRAINT resource_device_resource_id_reference
        FOREIGN KEY (account_id, resource_id) REFERENCES resource (account_id, id)
        ON DELETE CASCADE,
    CONSTRAINT resource_device_device_id_reference
        FOREIGN KEY (account_id, device_id) REFERENCES client (account_id, id)
);
CREATE INDEX resource_device_by_device ON resource_device (account_id, device_id);

INSERT INTO resource_site (account_id, resource_id, resource_kind, site_id, site_kind)
SELECT account_id, id, kind, site_id, 'static' FROM resource;
ALTER TABLE resource FORCE ROW LEVEL SECURITY;

CREATE FUNCTION link_members() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = holloway, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        DELETE FROM resource_site WHERE account_id = NEW.account_id AND resource_id = NEW.id;
        DELETE FROM resource_device WHERE account_id = NEW.account_id AND resource_id = NEW.id;
    END IF;
    -- A site that is not there gets a kind too, and is refused by the reference.
    INSERT INTO resource_site (account_id, resource_id, resource_kind, site_id, site_kind)
    SELECT NEW.account_id, NEW.id, NEW.kind, wanted, coalesce(site.kind, 'internet')
    FROM unnest(NEW.site_ids) wanted
    LEFT JOIN site ON site.account_id = NEW.account_id AND site.id = wanted;
    INSERT INTO resource_device (account_id, resource_id, device_id)
    SELECT NEW.account_id, NEW.id, wanted FROM unnest(NEW.device_ids) wanted;
    RETURN NULL;
END $$;

-- Its name comes before those of the triggers of references, and so does it: they then find the
-- new members, not the old ones of a resource that has become another kind.
CREATE TRIGGER "A_link_members" AFTER INSERT OR UPDATE OF kind, site_ids, device_ids ON resource
FOR EACH ROW EXECUTE FUNCTION link_members();

-- The previous release knows one site of a resource, `site_id`; it is the first of site_ids.
CREATE FUNCTION keep_first_site() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' AND NEW.site_ids IS NULL
        OR TG_OP = 'UPDATE' AND NEW.site_ids = OLD.site_ids
            AND NEW.site_id IS DISTINCT FROM OLD.site_id
    THEN
        NEW.site_ids := ARRAY[NEW.site_id];
    END IF;
    NEW.site_id := NEW.site_ids[1];
    RETURN NEW;
END $$;

CREATE TRIGGER keep_first_site BEFORE INSERT OR UPDATE ON resource
FOR EACH ROW EXECUTE FUNCTION keep_first_site();

ALTER TABLE policy
    DROP CONSTRAINT policy_conditions_check,
    ADD CONSTRAINT policy_conditions_check CHECK (are_conditions(conditions));

CREATE TABLE policy_test (
    account_id uuid NOT NULL CONSTRAINT policy_test_account_id_reference REFERENCES account (id),
    id uuid NOT NULL,
    name text NOT NULL CHECK (name <> '' AND is_printable(name, 255)),
    principal_id uuid NOT NULL,
    resource_id uuid NOT NULL,
    expected text NOT NULL CHECK (expected IN ('allowed', 'denied')),
    at timestamptz,
    remote_ip inet CHECK (is_host(remote_ip)),
    auth_provider_id uuid,
    client_verified boolean,
    posture jsonb NOT NULL CHECK (is_list(posture, 32)),
    created_at timestamptz NOT NULL,
    CONSTRAINT policy_test_id_unique PRIMARY KEY (account_id, id),
    CONSTRAINT policy_test_name_unique UNIQUE (account_id, name),
    CONSTRAINT policy_test_principal_id_reference
        FOREIGN KEY (account_id, principal_id) REFERENCES principal (account_id, id),
    CONSTRAINT policy_test_resource_id_reference
        FOREIGN KEY (account_id, resource_id) REFERENCES resource (account_id, id),
    CONSTRAINT policy_test_auth_provider_id_reference
        FOREIGN KEY (account_id, auth_provider_id) REFERENCES auth_provider (account_id, id)
);
CREATE INDEX policy_test_by_principal ON policy_test (account_id, principal_id);
CREATE INDEX policy_test_by_resource ON policy_test (account_id, resource_id);
CREATE INDEX policy_test_by_auth_provider ON policy_test (account_id, auth_provider_id);

-- --- tokens and agents ---------------------------------------------------------------------------

ALTER TABLE token NO FORCE ROW LEVEL SECURITY;
ALTER TABLE token
    ADD COLUMN auth_provider_id uuid,
    ADD COLUMN scopes jsonb NOT NULL DEFAULT '[]',
    ADD CONSTRAINT token_auth_provider_id_check
        CHECK (auth_provider_id IS NULL OR kind = 'client'),
    ADD CONSTRAINT token_scopes_check
        CHECK (are_scopes(scopes) AND (kind = 'api' OR jsonb_array_length(scopes) = 0)),
    ADD CONSTRAINT token_auth_provider_id_reference
        FOREIGN KEY (account_id, auth_provider_id) REFERENCES auth_provider (account_id, id);
CREATE INDEX token_by_auth_provider ON token (account_id, auth_provider_id);
-- So far an API token might do whatever its principal may.
UPDATE token SET scopes = '["*:write"]' WHERE kind = 'api';
ALTER TABLE token FORCE ROW LEVEL SECURITY;

ALTER TABLE client
    ADD COLUMN posture jsonb NOT NULL DEFAULT '[]' CHECK (is_list(posture, 32));

-- --- walls ---------------------------------------------------------------------------------------

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA holloway FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA holloway TO holloway_application;

DO $$
DECLARE
    entity text;
    columns text;
BEGIN
    FOREACH entity IN ARRAY ARRAY[
        'auth_provider', 'directory', 'identity', 'policy_test', 'resource_site', 'resource_device'
    ] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', entity);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', entity);
        EXECUTE format(
            'CREATE POLICY own_account ON %I USING (account_id = scope_account())', entity
        );
    END LOOP;

    FOREACH entity IN ARRAY ARRAY[
        'account', 'auth_provider', 'directory', 'identity', 'group', 'site', 'resource',
        'policy_test', 'token', 'client'
    ] LOOP
        SELECT string_agg(quote_ident(attname), ', ') INTO columns FROM pg_attribute
        WHERE attrelid = format('%I', entity)::regclass AND attnum > 0 AND NOT attisdropped
            AND attgenerated = '' AND attname NOT IN ('id', 'account_id');
        EXECUTE format('GRANT SELECT, INSERT, UPDATE (%s), DELETE ON %I TO holloway_application',
                       columns, entity);
    END LOOP;
END $$;
