"""The Lua that runs inside Redis or Valkey, and the keys it works on.

Owns: every key of the directory. Invariant: nothing accumulates. Everything expires, by the server's own clock, so that no clock of
a node or worker matters; every collection is bounded; and every script runs in time proportional to the number of nodes.

All keys of a cluster NAME carry the hash tag `{attnstore:NAME}`, so that they lie in one slot of a Redis Cluster.

| key        | type       | content                                                 | lives                                      |
|------------|------------|---------------------------------------------------------|--------------------------------------------|
| `nodes`    | hash       | node id -> record of the node, JSON                     | field: until its heartbeat is overdue      |
| `alive`    | sorted set | node id, scored with when its heartbeat is overdue (ms) | as above                                   |
| `intents`  | hash       | node id -> `drain` or `evict`                           | as long as the node is a member            |
| `quotas`   | hash       | tenant -> bytes over all nodes                          | until lifted; at most TENANTS_MAX          |
| `revision` | hash       | `incarnation` (random), `number` (counts changes)       | as the three first                         |
| `layouts`  | sorted set | record of a namespace, JSON, scored with when it is old | a day; at most DIRECTORY_LAYOUTS_MAX       |
| `events`   | stream     | page events, a batch of one node in each entry          | at most EVENT_BATCHES_MAX entries          |

`nodes`, `alive`, `intents` and `revision` go an hour after the last heartbeat of any node, `events` an hour after the last batch.

A directory that lost its memory (a restart without persistence, a fail-over to an empty replica) has a new incarnation: readers
then wait until every node had time for a heartbeat before they take a missing one for gone.

The scripts are sent with EVAL: at one call a second for each node and worker a kilobyte of text costs less than keeping track of
which server has which script after a fail-over.
"""

from __future__ import annotations

from typing import Final

from attnstore.limits import NODES_MAX

KEYS: Final = ("nodes", "alive", "intents", "quotas", "revision", "layouts", "events")

KEEP_MS: Final = 3_600_000
"""What is left of a cluster without heartbeats is forgotten after this long."""

_NOW: Final = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_PURGE: Final = f"""
if redis.call('HSETNX', KEYS[5], 'incarnation', ARGV[3]) == 1 then
  redis.call('HSETNX', KEYS[5], 'number', 0)
  redis.call('PEXPIRE', KEYS[5], {KEEP_MS})
end
local gone = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_ms, 'LIMIT', 0, {NODES_MAX})
for _, node_id in ipairs(gone) do
  redis.call('ZREM', KEYS[2], node_id)
  redis.call('HDEL', KEYS[1], node_id)
  redis.call('HDEL', KEYS[3], node_id)
end
if #gone > 0 then redis.call('HINCRBY', KEYS[5], 'number', 1) end
"""

_ANSWER: Final = f"""
local incarnation = redis.call('HGET', KEYS[5], 'incarnation') or ''
local number = redis.call('HGET', KEYS[5], 'number') or '0'
local is_known = incarnation == ARGV[1] and number == ARGV[2]
if is_known and redis.call('ZCOUNT', KEYS[2], '-inf', now_ms) == 0 then return {{}} end
local records = {{}}
for _, node_id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. now_ms, '+inf', 'LIMIT', 0, {NODES_MAX})) do
  local record = redis.call('HGET', KEYS[1], node_id)
  if record then
    records[#records + 1] = node_id
    records[#records + 1] = record
  end
end
return {{incarnation, number, records, redis.call('HGETALL', KEYS[3]), redis.call('HGETALL', KEYS[4])}}
"""

MEMBERSHIP: Final = _NOW + _ANSWER
"""The membership, without those whose heartbeat is overdue; changes nothing, so that a user who may only read can run it.

KEYS: nodes, alive, intents, quotas, revision. ARGV: incarnation and number of the revision that the caller knows. Answers with
nothing where that is still the one and nobody is overdue; a directory that was never written to has the incarnation ''.
"""

ANNOUNCE: Final = (
    _NOW
    + _PURGE
    + f"""
if redis.call('HEXISTS', KEYS[1], ARGV[4]) == 0 and redis.call('HLEN', KEYS[1]) >= {NODES_MAX} then
  return redis.error_reply('CLUSTERFULL no more nodes fit this cluster')
end
if redis.call('HGET', KEYS[1], ARGV[4]) ~= ARGV[5] then
  redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
  redis.call('HINCRBY', KEYS[5], 'number', 1)
end
redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[6]), ARGV[4])
for _, key in ipairs({{KEYS[1], KEYS[2], KEYS[3], KEYS[5]}}) do redis.call('PEXPIRE', key, ARGV[7]) end
"""
    + _ANSWER
)
"""A heartbeat. KEYS and ARGV[1..2] as in MEMBERSHIP.

ARGV[3] an incarnation for a directory that has none, [4] node id, [5] its record, [6] milliseconds until the next heartbeat is
overdue, [7] how long to keep all.
"""

WITHDRAW: Final = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then redis.call('HINCRBY', KEYS[5], 'number', 1) end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
"""
"""A node has left. KEYS as in MEMBERSHIP. ARGV[1] node id."""

SET_INTENT: Final = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
if ARGV[2] == '' then redis.call('HDEL', KEYS[3], ARGV[1]) else redis.call('HSET', KEYS[3], ARGV[1], ARGV[2]) end
redis.call('PEXPIRE', KEYS[3], ARGV[3])
redis.call('HINCRBY', KEYS[5], 'number', 1)
return 1
"""
"""What an operator wants of a node. KEYS as in MEMBERSHIP. ARGV[1] node id, [2] the intent, or nothing, [3] how long to keep it."""

SET_QUOTA: Final = """
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[4], ARGV[1])
elseif redis.call('HEXISTS', KEYS[4], ARGV[1]) == 0 and redis.call('HLEN', KEYS[4]) >= tonumber(ARGV[3]) then
  return redis.error_reply('TENANTSFULL no more quotas fit this cluster')
else
  redis.call('HSET', KEYS[4], ARGV[1], ARGV[2])
end
if redis.call('EXISTS', KEYS[5]) == 1 then redis.call('HINCRBY', KEYS[5], 'number', 1) end
return 1
"""
"""A tenant's quota. KEYS as in MEMBERSHIP. ARGV[1] tenant, [2] bytes, or nothing for none, [3] the most tenants."""

PUT_LAYOUTS: Final = (
    _NOW
    + """
for index = 3, #ARGV do redis.call('ZADD', KEYS[1], now_ms + tonumber(ARGV[1]), ARGV[index]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""
)
"""Layouts that are in use. KEYS[1] layouts. ARGV[1] milliseconds until they are old, [2] the most of them, [3...] records."""

LAYOUTS: Final = (
    _NOW
    + """
return redis.call('ZRANGEBYSCORE', KEYS[1], now_ms, '+inf')
"""
)
"""The layouts that are not old. KEYS[1] layouts."""

PUBLISH: Final = """
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'node', ARGV[3], 'packed', ARGV[4], 'dropped', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
"""A batch of page events. KEYS[1] events. ARGV[1] the most batches, [2] how long to keep, [3] node id, [4] events, [5] dropped."""
