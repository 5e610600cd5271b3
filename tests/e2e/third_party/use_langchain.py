"""Talk to a server through langchain-openai: python use_langchain.py URL MODEL. Prints what came back, as JSON."""

import json
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

url, model = sys.argv[1:]
where = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(**where, max_tokens=24)
question = "What is the capital of France?"


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """Return the weather in a city."""
    return city


whole = chat.invoke(question)
person = (
    ChatOpenAI(**where, max_tokens=200)
    .with_structured_output(Person, method="json_schema")
    .invoke("Describe Ada, who is 36 years old, as JSON.")
)
call = (
    ChatOpenAI(**where, max_tokens=60).bind_tools([get_weather], tool_choice="get_weather").invoke("Weather in Paris?")
)
print(
    json.dumps(
        {
            "whole": whole.content,
            "usage": whole.usage_metadata["output_tokens"],
            "streamed": "".join(chunk.content for chunk in chat.stream(question)),
            "batch": [answer.content for answer in chat.batch([question, question])],
            "person": person.model_dump(),
            "tool": call.tool_calls[0]["name"],
            "text": OpenAI(**where, max_tokens=8).invoke("The capital of France is"),
        }
    )
)
