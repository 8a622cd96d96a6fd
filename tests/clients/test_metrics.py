"""/metrics, by Prometheus' own parser, against the table in docs/server.md."""

import re

from prometheus_client import parser as prometheus
from prometheus_client.openmetrics import parser as openmetrics
from serving import ROOT


def documented():
    """(name, its type) of every metric, kvfold's and vLLM's."""
    section = (ROOT / "docs/server.md").read_text().split("## Metrics", 1)[1]
    for line in section.splitlines():
        cells = line.split("|")
        if len(cells) > 3 and "`" in cells[1]:
            for name in re.findall(r"(?:kvfold_|vllm:|process_)[a-z0-9_]+", cells[1] + cells[2]):
                yield name, re.search(r"gauge|counter|histogram", cells[3])[0]


def test_every_documented_metric(stories):
    stories.complete(prompt=["Once upon a time", "The dog"], max_tokens=20)
    status, headers, text = stories.ask("/metrics")
    assert status == 200
    # Both of Prometheus' formats will do, if it is the one that the header says.
    formats = {"text/plain": prometheus, "application/openmetrics-text": openmetrics}
    parse = formats[headers["content-type"].split(";")[0]].text_string_to_metric_families
    # By the names of samples: a family's name has no _total, and a histogram's samples have their ends.
    kinds = {sample.name: family.type for family in parse(text.decode()) for sample in family.samples}
    names = list(documented())
    assert len(names) > 30
    for name, kind in names:
        told = kinds.get(name) or kinds.get(name + "_bucket")
        # OpenMetrics has a type of its own for a gauge that says what runs.
        assert told == kind or (told, name) == ("info", "kvfold_info"), f"{name} is {told or 'not there'}, documented as a {kind}"


def test_what_a_request_adds(stories):
    before = stories.idle()
    answer = stories.complete(prompt="Once upon a time", max_tokens=20, ignore_eos=True)
    after = stories.idle()

    def more(series):
        return after.get(series, 0) - before.get(series, 0)

    assert more("kvfold_generation_tokens_total") == 20
    assert more("kvfold_prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert more('kvfold_requests_finished_total{reason="length"}') == 1
    assert more("kvfold_time_to_first_token_seconds_count") == 1
    assert more("kvfold_tokens_seen_total") == answer["usage"]["kvfold"]["tokens_seen"]
    assert after["kvfold_logical_ratio"] == after["kvfold_physical_ratio"] == 1
    assert after["kvfold_kv_bytes_held"] == 0
    assert after["process_resident_memory_bytes"] > 1 << 20
