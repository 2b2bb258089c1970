#!/bin/sh
# Gives eth0 a rate (LINK_RATE, for example 1gbit) and a delay (LINK_DELAY, for example 1ms), and runs until it is stopped.
# On a kernel without netem only the rate is set, by a token bucket; the log says so.
set -eu
if tc qdisc replace dev eth0 root netem rate "$LINK_RATE" delay "$LINK_DELAY" 2>/dev/null; then
    echo "eth0: rate $LINK_RATE, delay $LINK_DELAY"
else
    tc qdisc replace dev eth0 root tbf rate "$LINK_RATE" burst 256kb latency 20ms
    echo "eth0: rate $LINK_RATE; this kernel has no netem, so the delay is not there"
fi
trap 'tc qdisc delete dev eth0 root; exit 0' TERM INT
while :; do sleep 1; done
