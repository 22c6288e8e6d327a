"""Stands in for vLLM: writes down what it is asked, and answers each prompt with its own last tokens.

The environment says where to write (FAKE_VLLM_LOG, lines of JSON) and what goes wrong (FAKE_VLLM, such as "generate: die").
"""

import atexit
import json
import os
import sys
import time
from types import SimpleNamespace

from .sampling_params import SamplingParams as SamplingParams

__version__ = "0.0.fake"
N_TOKENS = 3


def note(**event):
    """Write down what happens, and let go wrong what shall."""
    print("Progress bars and logs of vLLM go to standard output.")
    with open(os.environ["FAKE_VLLM_LOG"], "a", encoding="utf8") as log:
        log.write(json.dumps(event) + "\n")
    when, _, what = os.environ.get("FAKE_VLLM", "").partition(": ")
    if when != event["do"]:
        return
    if what == "die":
        print("Segmentation fault, or the like", file=sys.stderr)
        os._exit(3)
    if what == "fail":
        raise RuntimeError("no room for the cache")
    if what == "stay":
        atexit.register(time.sleep, 600)


note(do="import", path=sys.path)
atexit.register(note, do="end")
if os.environ.get("FAKE_VLLM") == "import: miss":
    raise ModuleNotFoundError("No module named 'something'")


class LLM:
    def __init__(self, **settings):
        self.n_loaded = 1
        note(do="load", settings=settings)

    def collective_rpc(self, method, kwargs):
        self.n_loaded += 1
        note(do=method, **kwargs)

    def reset_prefix_cache(self):
        note(do="reset_prefix_cache")

    def generate(self, prompts, params, use_tqdm):
        asked = [{**vars(p), "ids": prompt["prompt_token_ids"]} for prompt, p in zip(prompts, params, strict=True)]
        note(do="generate", prompts=asked)
        return [SimpleNamespace(outputs=[self.answer(prompt)]) for prompt in asked]

    def answer(self, prompt):
        """The last tokens of the prompt and an end token, as far as the limit allows."""
        ids = [*prompt["ids"][-N_TOKENS:], prompt["stop_token_ids"][0]][: prompt["max_tokens"]]
        logprobs = [{token: SimpleNamespace(logprob=-0.5 * self.n_loaded)} for token in ids]
        return SimpleNamespace(token_ids=tuple(ids), logprobs=logprobs)
