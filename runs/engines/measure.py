"""Measures rows with every engine in turn and writes what came out; called by runs/engines.sh, which builds the engines.

A row is a number of sequences that are computed together and the tokens of each: `prefill:8x1810` reads 8 prompts of 1810
tokens, `decode:8x2048` decodes from a depth of 2048. Rates are tokens per second of all sequences. Every measurement is a
process of its own; within a round of a row the engines take turns.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROWS = [
    "prefill:1x512",
    "prefill:8x1810",
    "prefill:1x3656",
    "decode:1x0",
    "decode:1x4096",
    "decode:8x2048",
    "decode:8x7000",
]
MODEL = "models/smollm2-135m-instruct"
KVFOLD = "target/release/kvfold"
# The compressed model is measured where caches outweigh weights.
COMPRESSED_ROWS = {"decode:8x7000"}


@dataclass(frozen=True)
class Row:
    """What is computed."""

    kind: str
    sequences: int
    tokens: int

    @staticmethod
    def parse(text: str) -> "Row":
        kind, batch = text.split(":")
        sequences, tokens = batch.split("x")
        if kind not in ("prefill", "decode"):
            raise ValueError(text)
        return Row(kind, int(sequences), int(tokens))

    def __str__(self) -> str:
        return f"{self.kind}:{self.batch}"

    @property
    def batch(self) -> str:
        return f"{self.sequences}x{self.tokens}"


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}exit code {done.returncode}")
    return done.stdout


@dataclass
class Engine:
    """An engine with weights in some precision."""

    name: str
    version: str
    weights: str
    cache: str
    notes: dict = field(default_factory=dict)

    def measures(self, row: Row) -> bool:
        return True

    def rate(self, row: Row, args: argparse.Namespace) -> float:
        raise NotImplementedError


@dataclass
class Kvfold(Engine):
    model: str = MODEL
    options: tuple = ()
    only: frozenset = frozenset()

    def measures(self, row: Row) -> bool:
        return not self.only or str(row) in self.only

    def rate(self, row: Row, args: argparse.Namespace) -> float:
        command = [KVFOLD, "bench", "model", "--model", self.model, "--threads", str(args.threads), "--rounds", "1"]
        command += ["--tokens", str(args.tokens), f"--{row.kind}", row.batch, "--json", *self.options]
        result = json.loads(output_of(command))
        cell = result[row.kind][0]["models"][0]
        details = {key: cell[key] for key in ("logical_ratio", "physical_ratio", "products_of_peak", "cache_bytes")}
        details |= {f"bytes_{key}": value for key, value in cell.get("bytes", {}).items()}
        details |= {key: result["machine"][key] for key in ("level", "peak_f32", "peak_bf16", "bandwidth")}
        self.notes[str(row)] = details
        model = result["models"][0]
        self.cache = f"{model['cache']}, {model['policy']}"
        return cell["tokens_per_second"]["median"]


@dataclass
class Llama(Engine):
    file: str = ""

    def rate(self, row: Row, args: argparse.Namespace) -> float:
        model = str(args.home / self.file)
        if row.tokens == 0:
            command = [str(args.llama / "llama-bench"), "-m", model, "-t", str(args.threads)]
            command += ["-p", "0", "-n", str(args.tokens), "-r", "1", "-o", "json"]
            if row.sequences > 1:
                sys.exit(f"{row}: llama-bench decodes one sequence")
            return json.loads(output_of(command))[0]["avg_ts"]
        new = args.tokens if row.kind == "decode" else 1
        command = [str(args.llama / "llama-batched-bench"), "-m", model, "-t", str(args.threads)]
        # A sequence's share of the context is rounded to whole cells of its own.
        context = row.sequences * (row.tokens + new + 256)
        command += ["-c", str(context), "-npp", str(row.tokens), "-ntg", str(new), "-npl", str(row.sequences)]
        command += ["--output-format", "jsonl"]
        (line,) = [line for line in output_of(command).splitlines() if line.startswith("{")]
        return json.loads(line)["speed_tg" if row.kind == "decode" else "speed_pp"]


@dataclass
class OpenVino(Engine):
    kv: str = ""

    def rate(self, row: Row, args: argparse.Namespace) -> float:
        script = str(Path(__file__).with_name("openvino_rows.py"))
        command = [sys.executable, script, str(args.home / "smollm2-f16.gguf"), "--threads", str(args.threads)]
        command += ["--tokens", str(args.tokens), f"--{row.kind}", row.batch]
        if self.kv:
            command += ["--kv-precision", self.kv]
        result = json.loads(output_of(command).splitlines()[-1])
        self.version = result["version"]
        self.notes |= result["precision"]
        return result[row.kind][row.batch]


def cpu_flags() -> set[str]:
    with open("/proc/cpuinfo") as info:
        line = next((line for line in info if line.startswith("flags")), ":")
    return set(line.split(":")[1].split())


def engines(args: argparse.Namespace) -> list[Engine]:
    version = output_of([KVFOLD, "--version"]).split(maxsplit=1)[1].strip()
    found: list[Engine] = [Kvfold("kvfold bf16", version, "bf16", "")]
    # Nothing of an engine that is not asked for has to be there.
    llama = "" if args.engines and not any("llama" in name for name in args.engines) else llama_version(args)
    for weights, file in (("bf16", "smollm2-bf16.gguf"), ("f16", "smollm2-f16.gguf")):
        found.append(Llama(f"llama.cpp {weights}", llama, weights, "f16", file=file))
    found.append(OpenVino("openvino", "", "f16, computed as noted", "u8, its default"))
    found.append(OpenVino("openvino f16 cache", "", "f16, computed as noted", "f16", kv="f16"))
    if "q8" in output_of([KVFOLD, "generate", "--help"]):
        options = ("--precision", "q8")
        found.append(Kvfold("kvfold q8", version, "q8", "", options=options))
    found.append(Llama("llama.cpp q8_0", llama, "q8_0", "f16", file="smollm2-q8_0.gguf"))
    if args.compressed:
        only = frozenset(COMPRESSED_ROWS)
        options = ("--text", args.text)
        name = "kvfold bf16 compressed"
        found.append(Kvfold(name, version, "bf16", "", model=args.compressed, options=options, only=only))
    if args.engines:
        unknown = set(args.engines) - {engine.name for engine in found}
        if unknown:
            sys.exit(f"no engine {', '.join(sorted(unknown))}; there are: {', '.join(e.name for e in found)}")
        found = [engine for engine in found if engine.name in args.engines]
    return found


def llama_version(args: argparse.Namespace) -> str:
    model = str(args.home / "smollm2-bf16.gguf")
    command = [str(args.llama / "llama-bench"), "-m", model, "-p", "1", "-n", "0", "-r", "1", "-o", "json"]
    built = json.loads(output_of(command))[0]
    package = args.llama.parents[3].name.replace("llama_cpp_python-", "llama-cpp-python ")
    return f"{built['build_commit']} ({package})"


class Load:
    """What others took of the machine while a row was measured, by the system's accounts."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.busy = self.accounts()
        self.ours = self.own()

    @staticmethod
    def accounts() -> tuple[float, float]:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        ticks = os.sysconf("SC_CLK_TCK")
        return (user + nice + system + irq + softirq) / ticks, steal / ticks

    @staticmethod
    def own() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    def others(self) -> dict:
        seconds = time.monotonic() - self.started
        busy, stolen = (now - then for now, then in zip(self.accounts(), self.busy))
        ours = self.own() - self.ours
        return {"cores": round(max(0.0, busy - ours) / seconds, 3), "stolen": round(stolen / seconds, 3)}


def machine() -> dict:
    with open("/proc/cpuinfo") as info:
        cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    sets = ["avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    has = [name for name in sets if name in cpu_flags()]
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_bytes": memory, "instruction_sets": has}


def summary(rates: list[float]) -> dict:
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "rounds": rates}


def peer_of(engine: Engine, found: list[Engine]) -> Engine | None:
    """The kvfold that an engine is compared with: in 8 bits where both are, else in 16."""
    if isinstance(engine, Kvfold):
        return None
    names = {other.name: other for other in found}
    return (names.get("kvfold q8") if engine.weights.startswith("q8") else None) or names.get("kvfold bf16")


def commit() -> str:
    return output_of(["git", "rev-parse", "--short", "HEAD"]).strip()


def measured_row(
    args: argparse.Namespace, row: Row, found: list[Engine], rates: dict[str, list[float]], load: Load
) -> dict:
    result = {"row": str(row), "sequences": row.sequences, "tokens": row.tokens}
    result |= {"command": args.command, "commit": commit(), "date": str(datetime.date.today()), "machine": machine()}
    result |= {"decoded_tokens": args.tokens, "others": load.others(), "engines": {}}
    for engine in (engine for engine in found if engine.name in rates):
        cell = summary(rates[engine.name])
        peer = peer_of(engine, found)
        if peer and peer.name in rates:
            cell["kvfold_over_this"] = round(statistics.median(rates[peer.name]) / cell["median"], 3)
            cell["compared_with"] = peer.name
        if isinstance(engine, Kvfold):
            cell |= engine.notes[str(row)]
        result["engines"][engine.name] = cell
    return result


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        for name, cell in row["engines"].items():
            ratio = f"{cell['kvfold_over_this']:.2f}x" if "kvfold_over_this" in cell else ""
            lines.append(f"{row['row']:<16} {name:<24} {cell['median']:>9.1f} tokens/s  {ratio}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="where the engines and their models are")
    parser.add_argument("--llama", type=Path, required=True, help="where llama.cpp's programs are")
    parser.add_argument("--command", required=True, help="what the result says it came from")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--engines", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="tokens that each sequence decodes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compressed", help="a model directory or delta that compresses its cache")
    parser.add_argument("--text", default="data/tinystories_heldout.txt", help="what the compressed model reads")
    parser.add_argument("--out", default="results/engines.json", help="its rows that are not measured now stay")
    args = parser.parse_args()

    rows = [Row.parse(row) for row in args.rows]
    found = engines(args)
    measured, known = {}, {}
    if os.path.exists(args.out):
        with open(args.out) as file:
            before = json.load(file)
        measured, known = {row["row"]: row for row in before["rows"]}, before["engines"]
    for row in rows:
        load = Load()
        rates: dict[str, list[float]] = {}
        for number in range(args.rounds):
            for engine in (engine for engine in found if engine.measures(row)):
                rate = engine.rate(row, args)
                rates.setdefault(engine.name, []).append(rate)
                print(f"{row} round {number + 1}: {engine.name} {rate:.1f}", file=sys.stderr, flush=True)
        measured[str(row)] = measured_row(args, row, found, rates, load)
        write(args, found, known, list(measured.values()))
    print(table([measured[str(row)] for row in rows]))


def write(args: argparse.Namespace, found: list[Engine], known: dict, rows: list[dict]) -> None:
    """The result as far as it is known, in place of the one before, whose engines are `known`."""
    result = {
        "schema": "kvfold.engines/2",
        "threads": args.threads,
        "what": "tokens/s of all sequences together; kvfold_over_this above 1 where kvfold is faster",
        "engines": known
        | {
            engine.name: {"version": engine.version, "weights": engine.weights, "cache": engine.cache}
            | ({} if isinstance(engine, Kvfold) else engine.notes)
            for engine in found
        },
        "rows": rows,
    }
    with open(f"{args.out}.new", "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(f"{args.out}.new", args.out)


if __name__ == "__main__":
    main()
