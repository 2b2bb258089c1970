"""iperf3, if it is installed: one TCP stream with the bytes of a whole pass, in writes of a page (at most its maximum of 1 MiB).

A stream has no requests and no slots; its one operation is the transfer, timed by iperf3 itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

from attnstore.address import Address
from experiments.bandwidth.lane import Sample, Start

_WRITE_BYTES_MAX = 1 << 20


def stream(start: Start, verb: str, batch: int) -> Sample:
    """Transfers `batch` pages once; in a read the server sends."""
    address = Address.parse(start.address)
    write_bytes = min(start.page_bytes, _WRITE_BYTES_MAX)
    command = ["iperf3", "--client", address.host, "--port", str(address.port), "--json", "--length", str(write_bytes)]
    command += ["--bytes", str(batch * start.page_bytes), *(["--reverse"] if verb.endswith(" read") else [])]
    end = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)["end"]
    received, load = end["sum_received"], end["cpu_utilization_percent"]
    took_ns = int(received["seconds"] * 1e9)
    client_ns, server_ns = (int(took_ns * load[side] / 100) for side in ("host_total", "remote_total"))
    return Sample([took_ns], int(received["bytes"]), client_ns, server_ns)


if __name__ == "__main__":
    START = Start.from_arguments()
    print(json.dumps(["iperf3 read", "iperf3 write"]), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        print(json.dumps(asdict(stream(START, ask["verb"], ask["batch"]))), flush=True)
