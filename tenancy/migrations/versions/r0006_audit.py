"""The audit log: appended to only, chained per tenant, by months."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0006"
down_revision = "0005"

# What a search matches: words, and the parts of ids, paths and addresses, which the parser would keep in one piece.
WORDS = r"""
CREATE FUNCTION audit_words(description text, resource_type text, resource_id text) RETURNS tsvector
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN to_tsvector('simple', translate(
    description || ' ' || resource_type || ' ' || resource_id,
    E'!"#$%&''()*+,-./\x3a;<=>?@[\\]^_`{|}~', repeat(' ', 32)
));
"""

TABLES = """
-- No foreign keys: evidence outlives what it is about.
CREATE TABLE audit_log (
    tenant_id uuid NOT NULL,
    seq bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    actor_type varchar(20) NOT NULL DEFAULT 'user' CHECK (actor_type IN ('user', 'api_key', 'system')),
    actor_id uuid,
    actor_email varchar(320) NOT NULL DEFAULT '',
    ip_address inet,
    user_agent varchar(500) NOT NULL DEFAULT '',
    action varchar(20) NOT NULL CHECK (action IN (
        'create', 'update', 'delete', 'login', 'logout', 'api_call', 'permission_change', 'settings_change',
        'billing_event')),
    resource_type varchar(50) NOT NULL,
    resource_id varchar(255) NOT NULL DEFAULT '',
    description text NOT NULL DEFAULT '',
    old_values jsonb,
    new_values jsonb,
    metadata jsonb NOT NULL DEFAULT '{}',
    request_id varchar(100) NOT NULL DEFAULT '',
    prev bytea NOT NULL,
    hash bytea NOT NULL,
    words tsvector GENERATED ALWAYS AS (audit_words(description, resource_type, resource_id)) STORED,
    PRIMARY KEY (tenant_id, seq, at)
) PARTITION BY RANGE (at);
CREATE INDEX ON audit_log (tenant_id, at);
CREATE INDEX ON audit_log (id);
CREATE INDEX ON audit_log (actor_id, at);
CREATE INDEX ON audit_log (resource_type, resource_id);
CREATE INDEX ON audit_log USING gin (words);

-- Where each chain ends. Rewritten with every line, so there is room for the next version on the same page.
CREATE TABLE audit_heads (
    tenant_id uuid PRIMARY KEY,
    seq bigint NOT NULL,
    hash bytea NOT NULL
) WITH (fillfactor = 50);

-- The pieces of chains that were archived. There can be several of one month: `at` is when a transaction began and
-- `seq` the order in which they were chained, so around midnight, or when a clock is set back, months interlace.
CREATE TABLE audit_anchors (
    tenant_id uuid NOT NULL,
    seq bigint NOT NULL,
    first bigint NOT NULL,
    prev bytea NOT NULL,
    hash bytea NOT NULL,
    month timestamptz NOT NULL,
    digest bytea NOT NULL,
    archived_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, seq)
);
"""

CHAIN = """
-- What a line says, without any way to read it differently; archived files hold this text as it is.
CREATE FUNCTION audit_text(entry audit_log) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN jsonb_build_array(
    entry.tenant_id, entry.seq, extract(epoch FROM entry.at)::text, entry.id, entry.actor_type, entry.actor_id,
    entry.actor_email, entry.ip_address::text, entry.user_agent, entry.action, entry.resource_type,
    entry.resource_id, entry.description, entry.old_values::text, entry.new_values::text, entry.metadata::text,
    entry.request_id
)::text;

CREATE FUNCTION audit_hash(entry audit_log) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE
RETURN sha256(entry.prev || convert_to(audit_text(entry), 'UTF8'));

-- With the owner's rights, for the heads, which nobody else may write: whoever can could cut the chain.
CREATE FUNCTION audit_chain() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    head public.audit_heads;
BEGIN
    SELECT * INTO head FROM public.audit_heads WHERE tenant_id = NEW.tenant_id FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO public.audit_heads VALUES (NEW.tenant_id, 0, '\\x00') ON CONFLICT DO NOTHING;
        SELECT * INTO head FROM public.audit_heads WHERE tenant_id = NEW.tenant_id FOR UPDATE;
    END IF;
    NEW.seq := head.seq + 1;
    NEW.prev := head.hash;
    NEW.hash := public.audit_hash(NEW);
    UPDATE public.audit_heads SET seq = NEW.seq, hash = NEW.hash WHERE tenant_id = NEW.tenant_id;
    RETURN NEW;
END $$;
CREATE TRIGGER chained BEFORE INSERT ON audit_log FOR EACH ROW EXECUTE FUNCTION audit_chain();

-- Triggers stop a superuser too, who is bound by no grant.
CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only' USING ERRCODE = 'AV004';
END $$;
-- By statement, so that there need be no row to be refused; by row, for what reaches rows through another table's name.
CREATE TRIGGER kept BEFORE UPDATE OR DELETE ON audit_log FOR EACH ROW EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER kept_whole BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER kept_whole BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_anchors
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();
-- A head moves only from within a trigger: with a line.
CREATE TRIGGER kept_whole BEFORE TRUNCATE ON audit_heads FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER kept BEFORE INSERT OR UPDATE OR DELETE ON audit_heads FOR EACH STATEMENT WHEN (pg_trigger_depth() < 1)
    EXECUTE FUNCTION audit_refuse();
"""

# A chain's members are its lines, the archived pieces, and its head, which stands where the next line will and so tells
# whether the last one is the last. A piece counts when the platform's chain tells of its month, of the file's digest,
# and of as many lines as all pieces of that month have: else a row in audit_anchors would stand for any lines. Each
# member must begin where the one before ends, and continue its hash. When two do not fit, the earlier was rewritten,
# unless the next one does not continue the later one either.
VERIFY = """
-- The months that were archived, by their names, with the lines and SHA-256 of each one's file. Each archiving tells of
-- all before it, so that the newest line knows all of them when the older lines are archived themselves.
CREATE FUNCTION audit_archived() RETURNS jsonb LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT coalesce((
        SELECT l.metadata -> 'months' FROM audit_log l
        WHERE l.tenant_id = '00000000-0000-0000-0000-000000000000' AND l.resource_type = 'audit_log'
          AND l.metadata ? 'months'
        ORDER BY l.seq DESC LIMIT 1
    ), '{}');
END;

CREATE FUNCTION audit_verify(from_tenant uuid, to_tenant uuid)
RETURNS TABLE (tenant_id uuid, lines bigint, seq bigint, at timestamptz, upto bigint, what text)
LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH told AS MATERIALIZED (
        SELECT month.key AS month, month.value ->> 'sha256' AS digest, (month.value ->> 'lines')::bigint AS lines
        FROM jsonb_each(audit_archived()) month
    ),
    backed AS MATERIALIZED (
        SELECT a.month, a.digest
        FROM audit_anchors a
        GROUP BY a.month, a.digest
        HAVING (to_char(a.month AT TIME ZONE 'UTC', 'YYYY-MM'), encode(a.digest, 'hex'), sum(a.seq - a.first + 1))
            IN (SELECT t.month, t.digest, t.lines FROM told t)
    ),
    member AS (
        SELECT l.tenant_id, 2 AS kind, l.seq AS first, l.seq AS last, l.at, l.prev, l.hash,
               audit_hash(l) = l.hash AS good
        FROM audit_log l WHERE l.tenant_id BETWEEN from_tenant AND to_tenant
        UNION ALL
        SELECT a.tenant_id, 1, a.first, a.seq, NULL, a.prev, a.hash,
            EXISTS (SELECT FROM backed b WHERE b.month = a.month AND b.digest = a.digest)
        FROM audit_anchors a WHERE a.tenant_id BETWEEN from_tenant AND to_tenant
        UNION ALL
        SELECT h.tenant_id, 0, h.seq + 1, h.seq + 1, NULL, h.hash, NULL, true
        FROM audit_heads h WHERE h.tenant_id BETWEEN from_tenant AND to_tenant
    ),
    chain AS (
        SELECT m.*,
            lag(m.kind) OVER along AS kind_before,
            lag(m.last, 1, 0::bigint) OVER along AS before,
            lag(m.hash, 1, '\\x00'::bytea) OVER along AS expected,
            lag(m.good, 1, true) OVER along AS good_before,
            lead(m.first) OVER along AS after,
            lead(m.prev) OVER along AS continued
        FROM member m
        WINDOW along AS (PARTITION BY m.tenant_id ORDER BY m.first, m.kind, m.at)
    ),
    judged AS (
        SELECT c.tenant_id, c.kind, c.last,
            CASE
                WHEN c.kind > 0 AND (c.first <= c.before OR c.kind_before = 0) OR c.kind = 2 AND c.after = c.first
                    THEN ARRAY[c.first, c.first, 1]
                WHEN c.first > c.before + 1 THEN ARRAY[c.before + 1, c.first - 1, 2]
                WHEN NOT c.good THEN ARRAY[c.first, c.last, CASE c.kind WHEN 1 THEN 7 ELSE 3 END]
                WHEN c.prev <> c.expected AND c.good_before THEN CASE
                    WHEN c.kind_before IS NULL OR c.kind = 2 AND c.after = c.last + 1 AND c.continued <> c.hash
                        THEN ARRAY[c.first, c.first, 4]
                    WHEN c.kind_before = 1 THEN ARRAY[c.before, c.before, 5]
                    ELSE ARRAY[c.before, c.before, 4]
                END
            END AS bad
        FROM chain c
    ),
    verdict AS (
        SELECT j.tenant_id, count(*) FILTER (WHERE j.kind = 2) AS lines,
            coalesce(min(j.bad), CASE WHEN NOT bool_or(j.kind = 0) THEN ARRAY[max(j.last), max(j.last), 6] END) AS bad
        FROM judged j GROUP BY j.tenant_id
    )
    SELECT v.tenant_id, v.lines, v.bad[1], suspect.at, v.bad[2],
        (ARRAY['inserted', 'missing', 'edited', 'rewritten', 'archive', 'head', 'unbacked'])[v.bad[3]]
    FROM verdict v
    LEFT JOIN LATERAL (
        -- Of two lines with one number the false one is that which the next does not continue.
        SELECT l.at FROM audit_log l
        WHERE l.tenant_id = v.tenant_id AND l.seq = v.bad[1] AND v.bad[3] < 5
        ORDER BY audit_hash(l) = l.hash AND EXISTS (
            SELECT FROM audit_log n WHERE n.tenant_id = l.tenant_id AND n.seq = l.seq + 1 AND n.prev = l.hash
            UNION ALL
            SELECT FROM audit_heads h WHERE h.tenant_id = l.tenant_id AND h.seq = l.seq AND h.hash = l.hash
        ), l.at
        LIMIT 1
    ) suspect ON true;
END;
"""

MONTHS = """
-- Makes the partitions of the month before, for a clock that is set back, of this one and of those to come: there must
-- be one for a line to be written.
CREATE FUNCTION audit_months(ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET lock_timeout = '2s' AS $$
DECLARE
    month timestamptz;
    name text;
    made integer := 0;
BEGIN
    IF ahead NOT BETWEEN 0 AND 120 THEN
        RAISE EXCEPTION 'ahead must be 0 to 120' USING ERRCODE = '22023';
    END IF;
    FOR n IN -1..ahead LOOP
        month := date_trunc('month', now()) + make_interval(months => n);
        name := 'audit_log_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass('public.' || name) IS NOT NULL;
        -- One at a time; and whoever locks a table sees what others have made meanwhile, not whoever merely waits.
        LOCK TABLE public.audit_log IN SHARE UPDATE EXCLUSIVE MODE;
        CONTINUE WHEN to_regclass('public.' || name) IS NOT NULL;
        -- Attached, not made as a partition: that would wait for whoever writes, and everybody would wait for it.
        EXECUTE format('CREATE TABLE public.%I (LIKE public.audit_log INCLUDING DEFAULTS INCLUDING GENERATED '
                       'INCLUDING CONSTRAINTS)', name);
        -- Reached through the log its policies count; reached by its own name, by nobody.
        EXECUTE format('ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE public.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE TRIGGER kept_whole BEFORE UPDATE OR DELETE OR TRUNCATE ON public.%I FOR EACH STATEMENT '
                       'EXECUTE FUNCTION public.audit_refuse()', name);
        EXECUTE format('ALTER TABLE public.audit_log ATTACH PARTITION public.%I FOR VALUES FROM (%L) TO (%L)',
                       name, month, month + interval '1 month');
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;

-- Drops a month whose lines are in a file, and keeps where its pieces begin and end. The month must have ended 90 days
-- ago, whatever the keeper asks for, and be whole: what was tampered with must not vanish.
CREATE FUNCTION audit_archive(month timestamptz, lines bigint, digest bytea) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET lock_timeout = '2s' AS $$
DECLARE
    name text := 'audit_log_' || to_char(month, 'YYYY_MM');
    bad record;
    counted bigint;
    told jsonb := jsonb_build_object('lines', lines, 'sha256', encode(digest, 'hex'));
BEGIN
    IF month <> date_trunc('month', month) OR month + interval '1 month' > now() - interval '90 days' THEN
        RAISE EXCEPTION 'the audit log is kept for 90 days' USING ERRCODE = 'AV004';
    END IF;
    SELECT one.tenant_id, one.seq INTO bad FROM (
        SELECT l.tenant_id, l.seq, l.prev, public.audit_hash(l) = l.hash AS good,
            lag(l.seq) OVER along AS before, lag(l.hash) OVER along AS expected
        FROM public.audit_log l WHERE l.at >= month AND l.at < month + interval '1 month'
        WINDOW along AS (PARTITION BY l.tenant_id ORDER BY l.seq, l.at)
    ) one
    WHERE NOT one.good OR one.before = one.seq OR one.before = one.seq - 1 AND one.prev <> one.expected
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'line % of tenant % was tampered with', bad.seq, bad.tenant_id USING ERRCODE = 'AV006';
    END IF;
    INSERT INTO public.audit_anchors (tenant_id, seq, first, prev, hash, month, digest)
    SELECT piece.tenant_id, max(piece.seq), min(piece.seq), (array_agg(piece.prev ORDER BY piece.seq))[1],
        (array_agg(piece.hash ORDER BY piece.seq DESC))[1], audit_archive.month, audit_archive.digest
    FROM (
        SELECT l.tenant_id, l.seq, l.prev, l.hash,
            l.seq - row_number() OVER (PARTITION BY l.tenant_id ORDER BY l.seq) AS island
        FROM public.audit_log l
        WHERE l.at >= audit_archive.month AND l.at < audit_archive.month + interval '1 month'
    ) piece
    GROUP BY piece.tenant_id, piece.island;
    SELECT coalesce(sum(a.seq - a.first + 1), 0) INTO counted
    FROM public.audit_anchors a WHERE a.month = audit_archive.month;
    IF counted <> lines THEN
        RAISE EXCEPTION 'the file holds % lines, the month %', lines, counted USING ERRCODE = 'AV006';
    END IF;
    INSERT INTO public.audit_log (tenant_id, actor_type, action, resource_type, resource_id, description, metadata)
    VALUES ('00000000-0000-0000-0000-000000000000', 'system', 'delete', 'audit_log', to_char(month, 'YYYY-MM'),
        'archived a month of audit', told || jsonb_build_object('months', public.audit_archived()
            || jsonb_build_object(to_char(month, 'YYYY-MM'), told)));
    EXECUTE format('DROP TABLE public.%I', name);
END $$;
"""


def upgrade() -> None:
    for script in (WORDS, TABLES, CHAIN, VERIFY, MONTHS):
        op.execute(script)
    for table in ("audit_log", "audit_heads", "audit_anchors"):
        protect(table, roles="avb_app")
        # The owner is nobody who logs in, but the functions above.
        op.execute(f"CREATE POLICY chain ON {table} TO avb_owner USING (true) WITH CHECK (true)")
    # Who archives months sees the lines that may be archived, and no newer ones.
    op.execute("CREATE POLICY archive ON audit_log FOR SELECT TO avb_keeper USING (at < now() - interval '90 days')")
    columns = (
        "tenant_id, actor_type, actor_id, actor_email, ip_address, user_agent, action, resource_type, resource_id, "
        "description, old_values, new_values, metadata, request_id"
    )
    op.execute(f"GRANT SELECT, INSERT ({columns}) ON audit_log TO avb_app, avb_system")
    grant("audit_log", avb_keeper="SELECT")
    for table in ("audit_heads", "audit_anchors"):
        grant(table, avb_app="SELECT", avb_system="SELECT")
    rights = {
        "audit_chain()": "",
        "audit_refuse()": "",
        "audit_words(text, text, text)": "avb_app, avb_system",
        "audit_text(audit_log)": "avb_app, avb_system, avb_keeper",
        "audit_hash(audit_log)": "avb_app, avb_system",
        "audit_archived()": "avb_system",
        "audit_verify(uuid, uuid)": "avb_system",
        "audit_months(integer)": "avb_system, avb_keeper",
        "audit_archive(timestamptz, bigint, bytea)": "avb_keeper",
    }
    for function, may in rights.items():
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        if may:
            op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO {may}")
    op.execute("SELECT audit_months(12)")


def downgrade() -> None:
    for function in (
        "audit_archive(timestamptz, bigint, bytea)",
        "audit_months(integer)",
        "audit_verify(uuid, uuid)",
        "audit_archived()",
        "audit_hash(audit_log)",
        "audit_text(audit_log)",
    ):
        op.execute(f"DROP FUNCTION {function}")
    op.execute("DROP TABLE audit_log, audit_heads, audit_anchors")
    op.execute("DROP FUNCTION audit_chain(), audit_refuse(), audit_words(text, text, text)")
