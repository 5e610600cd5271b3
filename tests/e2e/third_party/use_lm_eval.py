"""Let lm-eval score a task: python use_lm_eval.py URL MODEL TOKENIZER-FOLDER TASK-FOLDER TASK.

Prints the score, its standard error and the log probability of each choice, as JSON.
"""

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

url, model, tokenizer, folder, task = sys.argv[1:]
arguments = {"model": model, "base_url": f"{url}/v1/completions", "tokenizer": tokenizer, "num_concurrent": 4}
results = simple_evaluate(
    model="local-completions",
    model_args={**arguments, "tokenizer_backend": "huggingface"},
    tasks=[task],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    batch_size=4,
    bootstrap_iters=0,
)
samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
scores = results["results"][task]
print(
    json.dumps(
        {
            "accuracy": scores["acc,none"],
            "logprobs": [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples],
        }
    )
)
