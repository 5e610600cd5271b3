"""Talk to a server through llama-index: python use_llama_index.py URL MODEL. Prints what came back, as JSON."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, model = sys.argv[1:]
where = {"model": model, "api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
chat = OpenAILike(**where, is_chat_model=True, max_tokens=24, context_window=2048)
text = OpenAILike(**where, is_chat_model=False, max_tokens=8, context_window=2048)
messages = [ChatMessage(role="user", content="What is the capital of France?")]
print(
    json.dumps(
        {
            "whole": chat.chat(messages).message.content,
            "streamed": "".join(piece.delta or "" for piece in chat.stream_chat(messages)),
            "text": text.complete("The capital of France is").text,
            "text_streamed": "".join(piece.delta or "" for piece in text.stream_complete("The capital of France is")),
        }
    )
)
