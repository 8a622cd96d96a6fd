"""Goldens of chat templates: what transformers makes of the templates in a directory.

    python oracle/golden_chat.py --dir crates/kvfold-model/tests/chats

Writes chats.json: for each template and chat the `text`, or `refused` with the words of the template's raise_exception.
The clock stands at 2024-07-26 15:04:05 and the special tokens are <s> and </s>.
"""
import argparse
import datetime
import json
from pathlib import Path

import jinja2
from transformers.utils import chat_template_utils

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, 15, 4, 5)


def message(role, content, **more):
    return {"role": role, "content": content, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place, in °C.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "default": 1.5}},
            "required": ["place"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {}}}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "Zürich", "days": 2}}}
HI, HELLO = message("user", "Hi there, <who> are you? "), message("assistant", "\nAn assistant. ")
ASK = message("user", "What's the weather in Zürich?")
TALK = [message("system", "Be brief."), HI, HELLO, ASK]
TOOLS = [ASK, message("assistant", "", tool_calls=[CALL]), message("tool", "21 and sunny", tool_call_id="abcdef123")]
THOUGHT = message("assistant", "<think>\nRain, perhaps.\n</think>\n\nIt rains.")
# Messages and the other arguments.
CHATS = [
    ([HI], {}),
    ([HI], {"add_generation_prompt": False}),
    (TALK, {}),
    (TALK[1:] + [HELLO, HI], {}),
    ([ASK], {"tools": [WEATHER, TIME]}),
    (TALK[:1] + TOOLS, {"tools": [WEATHER]}),
    (TOOLS + TOOLS[2:] + [message("assistant", "It is warm.")], {"tools": [WEATHER], "add_generation_prompt": False}),
    ([HI, THOUGHT, ASK], {"enable_thinking": False}),
    ([HI, THOUGHT], {"add_generation_prompt": False}),
    ([HI, message("assistant", "So.", reasoning_content="Hm.")], {"add_generation_prompt": False}),
    ([HI, HI], {}),
    ([HI], {"date_string": "1 Jan 2000"}),
]  # fmt: skip


def render(template, messages, options):
    options = {"add_generation_prompt": True, "tools": None, **options}
    try:
        texts, _ = chat_template_utils.render_jinja_template([messages], chat_template=template, **options, **TOKENS)
        return {"text": texts[0]}
    except jinja2.exceptions.UndefinedError:
        return {"failed": True}
    except jinja2.exceptions.TemplateError as error:
        return {"refused": str(error)}
    except TypeError:
        return {"failed": True}


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--dir", type=Path, required=True)
    args = args.parse_args()
    chat_template_utils.datetime = Clock
    cases = []
    for path in sorted(args.dir.glob("*.jinja")):
        for messages, options in CHATS:
            case = {"template": path.name, "messages": messages, **options, **render(path.read_text(), messages, options)}
            cases.append(case)
        done = [case for case in cases if case["template"] == path.name]
        print(path.name, len(done), [case.get("refused", "failed")[:40] for case in done if "text" not in case])
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (args.dir / "chats.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
