#!/usr/bin/env python3
"""What the daemon costs beside the engine: its CPU time when idle, and its speed with many streams
against `nestor bench` without a daemon.

    measure_daemon.py models/smollm2-135m-instruct.nested --clients 16 --tokens 256 --rounds 5

Prints the share of one CPU that an idle nestord takes, from /proc. Then, in turns, medians of the
rounds: tokens per second of `nestor generate --clients N`, counted while all streams run, and of
`nestor bench --rows N` with the same level, context, tokens and threads. The clients are one
program; the CPU time that they take from the daemon is printed, too. Run nothing else meanwhile.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

SETTLE_SECONDS = 3  # between the daemon's readiness and the first look at its clock


def fail(text):
    sys.exit(f"measure_daemon.py: {text}")


def run_json(command):
    command = [str(argument) for argument in command]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        fail(f"{' '.join(command)}: {process.stderr.strip()}")
    return json.loads(process.stdout)


@contextlib.contextmanager
def running_daemon(options):
    """The process and the address of a nestord that is ready."""
    with tempfile.TemporaryDirectory() as directory:
        port = pathlib.Path(directory) / "port"
        log = pathlib.Path(directory) / "log"
        with open(log, "wb") as output:
            daemon = subprocess.Popen(
                [options.build / "bin/nestord", "--config", "config/nestord.yaml"]
                + ["--model", options.model, "--listen", "127.0.0.1:0", "--port-file", port]
                + ["--set", f"device.threads={options.threads}"]
                + ["--set", "metrics.listen=127.0.0.1:0", "--set", "server.drain_grace_ms=0"],
                stdout=output,
                stderr=output,
            )
        try:
            while not (port.exists() and port.read_text().strip()):
                if daemon.poll() is not None:
                    fail(f"nestord did not start: {log.read_text()}")
                time.sleep(0.1)
            server = f"127.0.0.1:{port.read_text().strip()}"
            health = [options.build / "bin/nestor", "health", "--server", server, "--wait", "60s"]
            subprocess.run(health, check=True, stdout=subprocess.DEVNULL)
            yield daemon, server
        finally:
            daemon.terminate()
            daemon.wait()


def cpu_seconds(pid):
    """Of all threads that live, to the nanosecond."""
    threads = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def idle_share(pid, seconds):
    time.sleep(SETTLE_SECONDS)
    before, begin = cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.monotonic() - begin)


def measure_clients(options, server):
    """The reply of all clients, and the CPU time that they took themselves."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    reply = run_json(
        [options.build / "bin/nestor", "generate", "--server", server, "--json", "--ignore-eos"]
        + ["--clients", options.clients, "--max-tokens", options.tokens]
        + ["--level", options.level, " ".join(["word"] * options.context)]
    )
    seconds = time.monotonic() - begin
    if reply["tokens_per_second"] is None:
        fail("the streams did not run together; give them more --tokens")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return reply, used / seconds


def measure_bench(options, context):
    report = run_json(
        [options.build / "bin/nestor", "bench", options.model, "--json", "--rounds", "1"]
        + ["--threads", options.threads, "--levels", options.level, "--rows", options.clients]
        + ["--context", context, "--tokens", options.tokens, "--prompt-tokens", "1"]
    )
    return report["decode"][0]["tokens_per_second"]


def compare(options, server):
    daemon_speeds, bench_speeds, client_shares = [], [], []
    measure_clients(options, server)  # warms up
    for index in range(options.rounds):
        print(f"round {index + 1} of {options.rounds}", file=sys.stderr, flush=True)
        reply, share = measure_clients(options, server)
        daemon_speeds.append(reply["tokens_per_second"])
        client_shares.append(share)
        # The usage counts the prompts of all clients.
        context = reply["usage"]["prompt_tokens"] // options.clients
        bench_speeds.append(measure_bench(options, context))
    daemon, bench = statistics.median(daemon_speeds), statistics.median(bench_speeds)
    print(
        f"{options.clients} streams of {context} + {options.tokens} tokens at level "
        f"{options.level}, {options.threads} threads, {options.rounds} rounds in turns, medians:"
    )
    print(f"  daemon {daemon:.1f} tokens/s, bench {bench:.1f}: {daemon / bench:.3f} of it")
    print(f"  the clients took {statistics.median(client_shares):.2f} CPUs")
    print(
        "  rounds: " + ", ".join(f"{a:.1f} / {b:.1f}" for a, b in zip(daemon_speeds, bench_speeds))
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=pathlib.Path, help="an artifact of a language model")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--level", type=int, help="default: the full one")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--context", type=int, default=16, help="words of the prompt")
    parser.add_argument("--tokens", type=int, default=256, help="that each stream generates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle-seconds", type=float, default=20, help="0: not measured")
    options = parser.parse_args()
    # SIGTERM must end the daemon, too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.level is None:
        description = json.loads((options.model / "nested.json").read_text(encoding="utf-8"))
        options.level = len(description["levels"]) - 1
    with running_daemon(options) as (daemon, server):
        if options.idle_seconds > 0:
            share = idle_share(daemon.pid, options.idle_seconds)
            print(f"idle: {share:.3%} of one CPU over {options.idle_seconds:.0f} s", flush=True)
        if options.rounds > 0:
            compare(options, server)


if __name__ == "__main__":
    main()
