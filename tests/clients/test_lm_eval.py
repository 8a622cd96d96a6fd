"""lm-eval's `local-completions`: token ids in, echo and logprobs out. Its scores are held against kvfold's own."""

import json
import math
import subprocess

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows
from serving import HELD_OUT, STORIES

BOS = 1
QUESTIONS = [
    ("Once upon a time, there was a little", [" girl named Lily", " rocket engine", " boy"]),
    ("The dog was very", [" happy", " tax", " big and strong"]),
    ("She went to the park to", [" play with her friends", " sell", " ma"]),
    ("The sun was", [" shining", " under", " very hot and bright"]),
    ("Tom said, \"I want to", [" play with you", " 7", " be a bird"]),
    ("Mom said", [", \"Yes, you can.\"", " xqz", " no"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(stories):
    # The tokenizer is the model's own, read from its files by transformers; the server gets ids.
    return LocalCompletionsAPI(
        base_url=stories.url + "/v1/completions", model=stories.model(), tokenizer=str(STORIES), tokenizer_backend="huggingface",
        max_length=512, batch_size=4, num_concurrent=4, custom_prefix_token_id=BOS, max_retries=1,
    )  # fmt: skip


def scores(stories, ids):
    """Log-probability of each token of a prompt but the first, from a request of this one prompt."""
    answer = stories.complete(prompt=ids, echo=True, logprobs=0, max_tokens=0, temperature=0)
    return answer["choices"][0]["logprobs"]["token_logprobs"][1:]


def test_a_task(stories, model, tmp_path):
    rows = [{"question": question, "answers": answers, "right": 0} for question, answers in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # JSON is YAML too.
    task = {
        "task": "kvfold_stories",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "answers",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "stories.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(model, tasks=["kvfold_stories"], task_manager=manager, log_samples=True, bootstrap_iters=0)

    assert 0 <= results["results"]["kvfold_stories"]["acc,none"] <= 1
    samples = results["samples"]["kvfold_stories"]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        question = sample["doc"]["question"]
        for answer, (reported, greedy) in zip(sample["doc"]["answers"], sample["filtered_resps"]):
            context, continuation = model._encode_pair(question, answer)
            direct = scores(stories, context + continuation)[len(context) - 1 :]
            assert reported == pytest.approx(sum(direct), abs=1e-3)
            answered = stories.complete(prompt=context, max_tokens=len(continuation), temperature=0, logprobs=0, ignore_eos=True)
            said = answered["choices"][0]["logprobs"]["token_logprobs"]
            # The same tokens are the ones with the same probabilities.
            assert greedy == (said == pytest.approx(direct, abs=1e-4)), (question, answer)


def test_rolling(stories, model):
    """A text longer than the context, in the windows lm-eval cuts, is the sum over those windows."""
    text = HELD_OUT.read_text()[:3000]
    ids = model.tok_encode(text)
    assert len(ids) > 1100
    (rolled,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    direct = 0
    for context, predicted in get_rolling_token_windows(ids, BOS, model.max_length - 1, 1):
        direct += sum(scores(stories, [*context, predicted[-1]])[-len(predicted) :])
    assert rolled == pytest.approx(direct, abs=1e-2)


def test_against_eval_ppl(kvfold, stories, tmp_path):
    """The server's scores are those of `kvfold eval ppl`, which computes without it."""
    text = tmp_path / "text.txt"
    text.write_text(HELD_OUT.read_text()[:3000])
    command = [kvfold, "eval", "ppl", "--model", "stories260k", "--text", text, "--window", "256", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    ids = stories.json("/tokenize", {"prompt": text.read_text(), "add_special_tokens": False})["tokens"]
    windows = [ids[start : start + 256] for start in range(0, len(ids) - 255, 256)]
    of_server = [score for window in windows for score in scores(stories, window)]
    assert math.exp(-sum(of_server) / len(of_server)) == pytest.approx(report["perplexity"], rel=1e-4)


def test_generation(stories, model):
    arguments = ("Once upon a time", {"until": ["."], "max_gen_toks": 60})
    (text,) = model.generate_until([Instance("generate_until", {}, arguments, 0)])
    direct = stories.complete(prompt=model.tok_encode("Once upon a time"), max_tokens=60, temperature=0, stop=["."])
    assert text.strip() == direct["choices"][0]["text"].strip()
