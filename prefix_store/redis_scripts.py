"""Every step in Redis that writes more than one key, or that must see what it changes: one Lua script each."""

from __future__ import annotations

NOW_MS = """
local function now_ms()
    local now = redis.call('TIME')
    return now[1] * 1000 + math.floor(now[2] / 1000)
end
"""

# KEYS: AUDIT_NUMBER, audit of all, audit of the tenant, wherever entries are appended
# Returns: the number of the last of these documents in the tenant's audit
APPEND = """
local function append(number_key, all_key, tenant_key, documents)
    local last = redis.call('ZREVRANGE', tenant_key, 0, 0, 'WITHSCORES')
    local own = tonumber(last[2] or '0')
    for _, document in ipairs(documents) do
        local number = redis.call('INCR', number_key)
        own = own + 1
        redis.call('ZADD', all_key, number, string.format('%.0f %s', number, document))
        redis.call('ZADD', tenant_key, own, string.format('%.0f %s', own, document))
    end
    return own
end
"""

# KEYS: REVISIONS, NUM_VERSIONS, NUM_BYTES, tasks, names, ENTRIES, EVENTS, leases of the change's file (any key if
#       none), AUDIT_NUMBER, audit of all, audit of the tenant, TENANTS, TENANTS_REVISION
# ARGV: the change in JSON: `tenant`, `expected` and `expected_tenants` (the revisions of its tasks and of all tenants
#       that it was decided on), `revision` (the new one), `token` (of its lease; empty: none), `documents` {name:
#       document}, `gone` [name], `added` and `removed` [line of ENTRIES], `num_versions` and `num_bytes` (by how many
#       they grow), `names` (of the event), `audit` [document], `removes_tenant`, `is_told_only` (nothing but the audit
#       is written); the channel; how many events are kept
# Returns: `done`; `changed` where one of the two revisions is another one; `lost` where the lease has ended. Only
#       `done` wrote.
COMMIT = (
    NOW_MS
    + APPEND
    + """
local change = cjson.decode(ARGV[1])
local tenant = change.tenant
if tonumber(redis.call('HGET', KEYS[1], tenant) or '0') ~= change.expected then return 'changed' end
if tonumber(redis.call('GET', KEYS[13]) or '0') ~= change.expected_tenants then return 'changed' end
if change.token ~= '' then
    local ends = redis.call('HGET', KEYS[8], change.token)
    if not ends or tonumber(ends) <= now_ms() then return 'lost' end
end
append(KEYS[9], KEYS[10], KEYS[11], change.audit)
if change.is_told_only then return 'done' end
for name, document in pairs(change.documents) do
    redis.call('HSET', KEYS[4], name, document)
    redis.call('ZADD', KEYS[5], 0, name)
end
for _, name in ipairs(change.gone) do
    redis.call('HDEL', KEYS[4], name)
    redis.call('ZREM', KEYS[5], name)
end
for _, line in ipairs(change.removed) do redis.call('ZREM', KEYS[6], line) end
for _, line in ipairs(change.added) do redis.call('ZADD', KEYS[6], 0, line) end
redis.call('HINCRBY', KEYS[2], tenant, change.num_versions)
redis.call('HINCRBY', KEYS[3], tenant, change.num_bytes)
local revision = string.format('%.0f', change.revision)
redis.call('HSET', KEYS[1], tenant, revision)
redis.call('XADD', KEYS[7], 'MAXLEN', '~', ARGV[3], '*', 'tenant', tenant, 'revision', revision, 'names', change.names)
if change.removes_tenant then
    redis.call('HDEL', KEYS[12], tenant)
    local number = redis.call('INCR', KEYS[13])
    redis.call('XADD', KEYS[7], 'MAXLEN', '~', ARGV[3], '*', 'tenants', tenant, 'revision', number)
end
redis.call('PUBLISH', ARGV[2], revision)
return 'done'
"""
)

# KEYS: names, tasks
# ARGV: the first name as ZRANGEBYLEX takes it; how many
# Returns: documents, by name
LIST_TASKS = """
local found = {}
for i, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], '+', 'LIMIT', 0, ARGV[2])) do
    found[i] = redis.call('HGET', KEYS[2], name)
end
return found
"""

# KEYS: TENANTS, TENANTS_REVISION, EVENTS, AUDIT_NUMBER, audit of all, audit of the tenant
# ARGV: name; the revision that the change was decided on; the document (empty: the tenant goes); the channel; how many
#       events are kept; documents of the audit in JSON
# Returns: 1; 0 where the revision is another one, and then nothing was written
UPDATE_TENANT = (
    APPEND
    + """
if (redis.call('GET', KEYS[2]) or '0') ~= ARGV[2] then return 0 end
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
local revision = redis.call('INCR', KEYS[2])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', 'tenants', ARGV[1], 'revision', revision)
append(KEYS[4], KEYS[5], KEYS[6], cjson.decode(ARGV[6]))
redis.call('PUBLISH', ARGV[4], revision)
return 1
"""
)

# KEYS: AUDIT_NUMBER, audit of all, audit of the tenant
# ARGV: the document
# Returns: its number in the tenant's audit
APPEND_AUDIT = APPEND + "return append(KEYS[1], KEYS[2], KEYS[3], {ARGV[1]})"

# KEYS: USAGE_ROWS, usage batch, and a usage hash for every row
# ARGV: the rows in JSON: [[line of USAGE_ROWS, {name: count as text}]]; the one name whose counts are no integers; for
#       how many seconds the batch is remembered
# Returns: 1; 0 where the batch was added before, and then nothing was written
ADD_USAGE = """
if not redis.call('SET', KEYS[2], '1', 'NX', 'EX', ARGV[3]) then return 0 end
for i, row in ipairs(cjson.decode(ARGV[1])) do
    redis.call('ZADD', KEYS[1], 0, row[1])
    for name, count in pairs(row[2]) do
        redis.call(name == ARGV[2] and 'HINCRBYFLOAT' or 'HINCRBY', KEYS[i + 2], name, count)
    end
end
return 1
"""

# KEYS: bucket
# ARGV: amount; capacity; what it gains a second; 1 where it may owe
# Returns: whether it was taken (1, 0), what is left, after how many seconds it would be there (`inf`: never)
TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local amount, capacity, per_s = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local kept = redis.call('HMGET', KEYS[1], 'level', 'at')
local level = capacity
if kept[1] then level = math.min(capacity, kept[1] + math.max(0, now - kept[2]) * per_s) end
local taken, wait_s = 0, '0'
if ARGV[4] == '1' or amount <= math.max(0, level) + 1e-9 then
    level = math.min(capacity, level - amount)
    taken = 1
elseif amount > capacity or per_s <= 0 then
    wait_s = 'inf'
else
    wait_s = string.format('%.17g', (amount - level) / per_s)
end
redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'at', string.format('%.17g', now))
if per_s > 0 then redis.call('EXPIRE', KEYS[1], math.min(math.ceil((capacity - level) / per_s) + 60, 2592000)) end
return {taken, string.format('%.17g', math.max(0, level)), wait_s}
"""

# KEYS: leases, dropping
# ARGV: token; for how many ms
# Returns: 1; 0 while the file is being deleted
LEASE = (
    NOW_MS
    + """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now_ms() + ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
)

# KEYS: ENTRIES, leases, dropping
# ARGV: the file's first line in ENTRIES and what is behind its last one, as ZRANGEBYLEX takes them; token; for how many
#       ms it is marked
# Returns: 1 where nothing refers to the file, nor is about to, and nobody else deletes it: now it is marked; else 0
MARK_DROPPING = (
    NOW_MS
    + """
if #redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], ARGV[2], 'LIMIT', 0, 1) > 0 then return 0 end
for _, ends in ipairs(redis.call('HVALS', KEYS[2])) do
    if tonumber(ends) > now_ms() then return 0 end
end
return redis.call('SET', KEYS[3], ARGV[3], 'NX', 'PX', ARGV[4]) and 1 or 0
"""
)

# KEYS: dropping
# ARGV: token
# Returns: 1 where the mark was still this one's, and is gone now; else 0
UNMARK_DROPPING = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

# KEYS: REPLICAS
# ARGV: the replica's id; for how many ms it counts
# Returns: how many count
BEAT = (
    NOW_MS
    + """
redis.call('ZADD', KEYS[1], now_ms() + ARGV[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms())
return redis.call('ZCARD', KEYS[1])
"""
)
