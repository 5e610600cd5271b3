"""Talk to a server through Anthropic's own client: python use_anthropic.py URL MODEL. Prints what came back, as JSON.

OCTAVO_API_KEY: the key.
"""

import json
import os
import sys

import anthropic

url, model = sys.argv[1:]
key = os.environ["OCTAVO_API_KEY"]
client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
asked = {"model": model, "max_tokens": 200, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
tool = {
    "name": "Person",
    "description": "A person.",
    "input_schema": {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}},
}
choice = {"type": "tool", "name": tool["name"]}


def refusal(caller=client, **fields):
    """Return the type of the error that a call ends with, and what it says."""
    try:
        caller.messages.create(**{**asked, **fields})
    except anthropic.APIStatusError as error:
        return [type(error).__name__, str(error)]
    return None


whole = client.messages.create(**asked)
with client.messages.stream(**asked) as stream:
    streamed = "".join(stream.text_stream)
    final = stream.get_final_message()
call = client.messages.create(**asked, tools=[tool], tool_choice=choice)
with client.messages.stream(**asked, tools=[tool], tool_choice=choice) as stream:
    streamed_call = stream.get_final_message()
print(
    json.dumps(
        {
            "whole": whole.content[0].text,
            "streamed": streamed,
            "final": final.content[0].text,
            "counted": client.messages.count_tokens(model=model, messages=asked["messages"]).input_tokens,
            "call": [call.stop_reason, call.content[0].name, call.content[0].input],
            "streamed_call": [streamed_call.stop_reason, streamed_call.content[0].name, streamed_call.content[0].input],
            "refusals": {
                "field": refusal(stop_sequences=[5]),
                "model": refusal(model="other"),
                "key": refusal(anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)),
            },
        }
    )
)
