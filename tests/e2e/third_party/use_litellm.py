"""Talk to a server through litellm: python use_litellm.py URL MODEL. Prints what came back, as JSON."""

import asyncio
import json
import sys

import litellm

url, model = sys.argv[1:]
options = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 24}
messages = [{"role": "user", "content": "What is the capital of France?"}]
whole = litellm.completion(messages=messages, **options)
chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **options))
schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
schema["additionalProperties"] = False
form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
structured = litellm.completion(messages=messages, response_format=form, **options)
later = asyncio.run(litellm.acompletion(messages=messages, **options))
text = litellm.text_completion(
    prompt="The capital of France is", **{**options, "model": f"text-completion-openai/{model}"}
)
try:
    litellm.completion(messages=messages, **{**options, "temperature": -1})
    refusal = ""
except litellm.BadRequestError as error:
    refusal = str(error)
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "usage": whole.usage.completion_tokens,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "structured": structured.choices[0].message.content,
            "later": later.choices[0].message.content,
            "text": text.choices[0].text,
            "refusal": refusal,
        }
    )
)
