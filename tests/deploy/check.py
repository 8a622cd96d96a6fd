#!/usr/bin/env python3
"""Checks deploy/ without a cluster: manifests, unit, dashboard and alerts, against each other and docs/server.md.

Usage: tests/deploy/check.py        after pip install -r tests/deploy/requirements.txt

Kubernetes' own schemas come with kubernetes-validate. promtool, systemd-analyze and kubectl check more where they are
installed; what is missing is said, and is no failure.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
# Series that Prometheus makes itself.
PROMETHEUS_OWN = {"up"}
failures = 0
checks = 0


def check(what, holds, why=""):
    global checks, failures
    checks += 1
    if not holds:
        failures += 1
        print(f"FAILED: {what} {why}".rstrip())


def tool(what, *command):
    """Runs a program where it is installed."""
    if shutil.which(command[0]) is None:
        print(f"{command[0]} is not installed: {what} is not checked with it")
        return
    done = subprocess.run(command, capture_output=True, text=True)
    check(f"{what} ({' '.join(command[:3])})", done.returncode == 0, done.stdout + done.stderr)


def load(path):
    return list(yaml.safe_load_all(path.read_text()))


def documented_metrics():
    """Names in the table of docs/server.md; a histogram has three series more."""
    section = (ROOT / "docs/server.md").read_text().split("## Metrics", 1)[1]
    names = set()
    for line in section.splitlines():
        cells = line.split("|")
        if len(cells) > 2:
            found = re.findall(r"[`:]?((?:kvfold|process)_[a-z_]+)", cells[1])
            names.update(found)
            if "histogram" in cells[3]:
                names.update(name + end for name in found for end in ("_bucket", "_sum", "_count"))
    return names


def metrics_in(expression):
    return set(re.findall(r"\b(?:kvfold|process)_[a-z_]+\b|\bup\b(?=\{)", expression))


def manifests():
    by_kind = {}
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in load(path):
            by_kind[document["kind"]] = document
            if document["kind"] in ("Deployment", "Service", "NetworkPolicy"):
                try:
                    kubernetes_validate.validate(document, "1.37", strict=True)
                    check(path.name, True)
                except kubernetes_validate.ValidationError as error:
                    check(path.name, False, error.message)
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    args = server["args"]
    drain = int(args[args.index("--drain") + 1])
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    check("grace is longer than pause and drain", pod["terminationGracePeriodSeconds"] > drain + pause)
    for probe in ("startupProbe", "livenessProbe"):
        check(f"{probe} asks /health", server[probe]["httpGet"]["path"] == "/health")
    check("readiness asks /ready", server["readinessProbe"]["exec"]["command"] == ["kvfold-probe", "/ready"])
    check("runs as nobody", pod["securityContext"]["runAsNonRoot"] is True)
    inner = server["securityContext"]
    check("root is read-only", inner["readOnlyRootFilesystem"] is True)
    check("no privileges", inner["allowPrivilegeEscalation"] is False and inner["capabilities"]["drop"] == ["ALL"])
    check("memory has a limit", "memory" in server["resources"]["limits"])
    memory = int(re.fullmatch(r"(\d+)Gi", server["resources"]["limits"]["memory"])[1])
    check("--kv-memory fits", int(re.fullmatch(r"(\d+)GiB", args[args.index("--kv-memory") + 1])[1]) < memory)

    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("Service", "NetworkPolicy", "PodMonitor"):
        spec = by_kind[kind]["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        check(f"{kind} selects the pods", selector.get("matchLabels", selector).items() <= labels)
    secret = next(volume["secret"] for volume in pod["volumes"] if "secret" in volume)
    (endpoint,) = by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"]
    credentials = endpoint["authorization"]["credentials"]
    mount = next(mount for mount in server["volumeMounts"] if mount["name"] == "api-key")
    check("one Secret for server and monitor", (credentials["name"], credentials["key"]) == (secret["secretName"], mount["subPath"]))
    check("the monitor's port has a name", endpoint["port"] in [port["name"] for port in server["ports"]])
    check("the monitor's job is the alerts'", endpoint["relabelings"][0]["replacement"] == "kvfold")

    listed = set(by_kind["Kustomization"]["resources"])
    there = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml", "podmonitor.yaml"}
    check("kustomization lists every manifest", listed == there, str(listed ^ there))
    tool("kustomization", "kubectl", "kustomize", str(KUBERNETES))


def image():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.M)[1])
    check("the image starts kvfold serve", entry[:2] == ["kvfold", "serve"])
    (key,) = [mount["mountPath"] for mount in mounts() if mount["name"] == "api-key"]
    check("image and manifest agree on the key's path", entry[entry.index("--api-key-file") + 1] == key)
    check("the probe reads that key", key in (DEPLOY / "probe.sh").read_text())
    check("the image's user is no name", re.search(r"^USER \d+:\d+$", dockerfile, re.M))
    rust = re.search(r"^FROM rust:([\d.]+)", dockerfile, re.M)[1]
    needed = re.search(r'rust-version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text())[1]
    check("the image's Rust is the one the workspace asks for", rust == needed, f"{rust} and {needed}")


def mounts():
    (deployment,) = load(KUBERNETES / "deployment.yaml")
    return deployment["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]


def unit():
    text = (DEPLOY / "kvfold.service").read_text()
    drain = int(re.search(r"^ExecStart=.*--drain (\d+)", text, re.M)[1])
    check("systemd waits longer than the drain", int(re.search(r"^TimeoutStopSec=(\d+)", text, re.M)[1]) > drain)
    with tempfile.TemporaryDirectory() as scratch:
        # The program's path has to exist for verify.
        copy = Path(scratch) / "kvfold.service"
        copy.write_text(text.replace("/usr/local/bin/kvfold", "/bin/true"))
        tool("unit", "systemd-analyze", "verify", str(copy))


def dashboard():
    board = json.loads((DEPLOY / "grafana/kvfold.json").read_text())
    known = documented_metrics()
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    ids = [panel["id"] for panel in board["panels"]]
    check("panels have ids of their own", len(set(ids)) == len(ids))
    variables = {variable["name"] for variable in board["templating"]["list"]}
    check("the data source is a variable", "datasource" in variables)
    taken = set()
    rules = []
    shown = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        check(f"panel {panel['title']} overlaps none", not cells & taken and place["x"] + place["w"] <= 24)
        taken |= cells
        check(f"panel {panel['title']} uses the variable", panel["datasource"]["uid"] == "${datasource}")
        for target in panel["targets"]:
            expression = target["expr"]
            shown |= metrics_in(expression)
            check(f"metrics of {panel['title']}", metrics_in(expression) <= known, str(metrics_in(expression) - known))
            used = set(re.findall(r"\$([a-z]\w*)", expression))
            check(f"variables of {panel['title']}", used <= variables, str(used))
            plain = expression.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")
            rules.append({"record": f"panel:{panel['id']}:{target['refId']}", "expr": plain})
    families = {re.sub(r"_bucket$", "", name) for name in shown}
    missing = {name for name in known if not re.search(r"_(bucket|sum|count)$", name)} - families
    check("every metric is shown", not missing, str(missing))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "dashboard.yaml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        tool("the dashboard's queries", "promtool", "check", "rules", str(file))


def alerts():
    path = DEPLOY / "prometheus/alerts.yaml"
    known = documented_metrics() | PROMETHEUS_OWN
    (document,) = load(path)
    for rule in document["groups"][0]["rules"]:
        check(f"metrics of {rule['alert']}", metrics_in(rule["expr"]) <= known, str(metrics_in(rule["expr"]) - known))
        check(f"{rule['alert']} says what it is", rule["labels"]["severity"] and rule["annotations"]["summary"])
    tool("alerts", "promtool", "check", "rules", str(path))
    tool("what alerts say", "promtool", "test", "rules", str(Path(__file__).parent / "alerts.test.yaml"))


def main():
    for group in (manifests, image, unit, dashboard, alerts):
        group()
    print(f"{checks - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
