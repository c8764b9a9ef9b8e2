-- What is remembered beside entities: answers under an idempotency key, when devices were seen,
-- logs; and how far the changes of an account have been pruned.
--
-- The application may add to logs and read them. Only the owner, in the name of one account at a
-- time, removes what is too old: see actors/store/postgres/retention.py.

-- --- answers: of a token, which may belong to an account or to the installation ------------------

CREATE TABLE answer (
    token_id uuid NOT NULL
        CONSTRAINT answer_token_id_reference REFERENCES token (id) ON DELETE CASCADE,
    key text NOT NULL CHECK (key ~ '^[!-~]{1,255}$'),
    request_hash bytea NOT NULL CHECK (octet_length(request_hash) = 32),
    status integer NOT NULL CHECK (status BETWEEN 100 AND 599),
    body bytea NOT NULL CHECK (octet_length(body) <= 65536),
    at timestamptz NOT NULL,
    CONSTRAINT answer_key_unique PRIMARY KEY (token_id, key)
);
CREATE INDEX answer_by_age ON answer (at);

-- --- devices -------------------------------------------------------------------------------------

CREATE TABLE seen (
    account_id uuid NOT NULL,
    client_id uuid,
    gateway_id uuid,
    device_id uuid NOT NULL GENERATED ALWAYS AS (coalesce(client_id, gateway_id)) STORED,
    at timestamptz NOT NULL,
    version text NOT NULL CHECK (is_printable(version, 64)),
    remote_ip inet NOT NULL CHECK (is_host(remote_ip)),
    CONSTRAINT seen_device_id_unique PRIMARY KEY (account_id, device_id),
    CONSTRAINT seen_device_id_check CHECK (num_nonnulls(client_id, gateway_id) = 1),
    CONSTRAINT seen_client_id_reference
        FOREIGN KEY (account_id, client_id) REFERENCES client (account_id, id) ON DELETE CASCADE,
    CONSTRAINT seen_gateway_id_reference
        FOREIGN KEY (account_id, gateway_id) REFERENCES gateway (account_id, id) ON DELETE CASCADE
);
CREATE INDEX seen_by_client ON seen (account_id, client_id);
CREATE INDEX seen_by_gateway ON seen (account_id, gateway_id);

-- --- logs: one partition for each month ----------------------------------------------------------

-- They name accounts as changes do: by the row that outlives the account.
CREATE TABLE session_log (
    account_id uuid NOT NULL
        CONSTRAINT session_log_account_id_reference REFERENCES account_sequence (account_id),
    id uuid NOT NULL,
    at timestamptz NOT NULL,
    agent text NOT NULL CHECK (agent IN ('client', 'gateway')),
    event text NOT NULL CHECK (event IN ('connected', 'refused', 'disconnected')),
    device_id uuid,
    principal_id uuid,
    token_id uuid NOT NULL,
    auth_provider_id uuid,
    remote_ip inet NOT NULL CHECK (is_host(remote_ip)),
    version text NOT NULL CHECK (is_printable(version, 64)),
    reason text NOT NULL CHECK (is_printable(reason, 255)),
    CONSTRAINT session_log_id_unique PRIMARY KEY (account_id, id, at)
) PARTITION BY RANGE (at);
CREATE INDEX session_log_by_age ON session_log (account_id, at);
CREATE INDEX session_log_by_device ON session_log (account_id, device_id, id);
CREATE INDEX session_log_by_principal ON session_log (account_id, principal_id, id);
CREATE INDEX session_log_by_token ON session_log (account_id, token_id, id);

CREATE TABLE flow_log (
    account_id uuid NOT NULL
        CONSTRAINT flow_log_account_id_reference REFERENCES account_sequence (account_id),
    id uuid NOT NULL,
    at timestamptz NOT NULL,
    reporter text NOT NULL CHECK (reporter IN ('client', 'gateway')),
    authorization_id uuid NOT NULL,
    client_id uuid NOT NULL,
    gateway_id uuid NOT NULL,
    resource_id uuid NOT NULL,
    principal_id uuid,
    protocol text NOT NULL CHECK (protocol IN ('tcp', 'udp', 'icmp')),
    source inet NOT NULL CHECK (is_host(source)),
    source_port integer NOT NULL CHECK (source_port BETWEEN 0 AND 65535),
    destination inet NOT NULL CHECK (is_host(destination)),
    destination_port integer NOT NULL CHECK (destination_port BETWEEN 0 AND 65535),
    name text NOT NULL CHECK (is_printable(name, 253)),
    started_at timestamptz NOT NULL,
    ended_at timestamptz NOT NULL,
    packets_sent bigint NOT NULL CHECK (packets_sent >= 0),
    packets_received bigint NOT NULL CHECK (packets_received >= 0),
    bytes_sent bigint NOT NULL CHECK (bytes_sent >= 0),
    bytes_received bigint NOT NULL CHECK (bytes_received >= 0),
    CONSTRAINT flow_log_id_unique PRIMARY KEY (account_id, id, at),
    CONSTRAINT flow_log_ended_at_check CHECK (ended_at >= started_at)
) PARTITION BY RANGE (at);
CREATE INDEX flow_log_by_age ON flow_log (account_id, at);
CREATE INDEX flow_log_by_client ON flow_log (account_id, client_id, id);
CREATE INDEX flow_log_by_gateway ON flow_log (account_id, gateway_id, id);
CREATE INDEX flow_log_by_resource ON flow_log (account_id, resource_id, id);
CREATE INDEX flow_log_by_principal ON flow_log (account_id, principal_id, id);

CREATE TABLE request_log (
    account_id uuid NOT NULL
        CONSTRAINT request_log_account_id_reference REFERENCES account_sequence (account_id),
    id uuid NOT NULL,
    at timestamptz NOT NULL,
    token_id uuid,
    principal_id uuid,
    method text NOT NULL CHECK (method ~ '^[A-Z]{1,16}$'),
    path text NOT NULL CHECK (path <> '' AND is_printable(path, 512)),
    status integer NOT NULL CHECK (status BETWEEN 100 AND 599),
    code text NOT NULL CHECK (is_printable(code, 64)),
    remote_ip inet CHECK (is_host(remote_ip)),
    user_agent text NOT NULL CHECK (is_printable(user_agent, 255)),
    duration_us bigint NOT NULL CHECK (duration_us >= 0),
    CONSTRAINT request_log_id_unique PRIMARY KEY (account_id, id, at)
) PARTITION BY RANGE (at);
CREATE INDEX request_log_by_age ON request_log (account_id, at);
CREATE INDEX request_log_by_token ON request_log (account_id, token_id, id);
CREATE INDEX request_log_by_principal ON request_log (account_id, principal_id, id);

-- --- what is kept for a time only ----------------------------------------------------------------

-- The number of the last change that is gone: whoever knows less has to read the account anew.
ALTER TABLE account_sequence
    ADD COLUMN pruned bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT account_sequence_pruned_check CHECK (pruned BETWEEN 0 AND number);

CREATE INDEX authorization_by_end
    ON "authorization" (account_id, (coalesce(ended_at, expires_at)));

-- --- which key a number stands for: not the key, but what tells it from every other -------------

CREATE TABLE encryption_key (
    id integer CONSTRAINT encryption_key_id_unique PRIMARY KEY CHECK (id >= 0),
    fingerprint bytea NOT NULL CHECK (octet_length(fingerprint) = 32)
);
ALTER TABLE encryption_key ENABLE ROW LEVEL SECURITY;
ALTER TABLE encryption_key FORCE ROW LEVEL SECURITY;
CREATE POLICY installation ON encryption_key USING (scope_installation());
GRANT SELECT, INSERT ON encryption_key TO holloway_application;

-- --- walls ---------------------------------------------------------------------------------------

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['seen', 'session_log', 'flow_log', 'request_log', 'answer'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('GRANT SELECT, INSERT ON %I TO holloway_application', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['seen', 'session_log', 'flow_log', 'request_log'] LOOP
        EXECUTE format(
            'CREATE POLICY own_account ON %I USING (account_id = scope_account())', name
        );
    END LOOP;
END $$;

CREATE POLICY own_token ON answer USING (token_id = scope_token());
GRANT UPDATE (request_hash, status, body, at) ON answer TO holloway_application;
GRANT UPDATE (at, version, remote_ip) ON seen TO holloway_application;

-- Of whom old rows are removed, by the owner: it has the list, and never sees two accounts at once.
CREATE POLICY retention ON answer TO CURRENT_USER USING (scope_installation());
CREATE POLICY retention ON account_sequence FOR SELECT TO CURRENT_USER USING (scope_installation());
