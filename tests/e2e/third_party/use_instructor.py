"""Get an object through instructor's mode for /v1/responses: python use_instructor.py BASE_URL MODEL.

The key is in OCTAVO_API_KEY. Prints the object, as JSON.
"""

import os
import sys

import instructor
import openai
from pydantic import BaseModel

url, model = sys.argv[1:]


class Person(BaseModel):
    """A person."""

    name: str
    age: int


client = instructor.from_openai(
    openai.OpenAI(base_url=url, api_key=os.environ["OCTAVO_API_KEY"], max_retries=0),
    mode=instructor.Mode.RESPONSES_TOOLS,
)
person = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Ada is 36 years old."}],
    response_model=Person,
    max_retries=1,
)
print(person.model_dump_json())
