"""Tools and typed answers through langchain-openai.

    python langchain_tools.py http://127.0.0.1:3000/v1

Runs in the clients' environment, and prints the calls' results as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"20 C in {city}"


weather_tool = tool(weather)


class Forecast(BaseModel):
    """A forecast for a city."""

    city: str = Field(max_length=20)
    days: int = Field(ge=1, le=9)


chat = ChatOpenAI(
    base_url=sys.argv[1],
    api_key="-",
    model="tgi",
    max_retries=0,
    max_tokens=150,
    temperature=0,
    stream_usage=True,
)
bound = chat.bind_tools([weather_tool], tool_choice="any", parallel_tool_calls=False)
messages: list[Any] = [HumanMessage("What is the weather in Paris?")]
answer = bound.invoke(messages)
streamed: Any = None
for chunk in bound.stream(messages):
    streamed = chunk if streamed is None else streamed + chunk
messages.append(answer)
for call in answer.tool_calls:
    messages.append(ToolMessage(weather_tool.invoke(call["args"]), tool_call_id=call["id"]))
messages.append(chat.bind_tools([weather_tool], parallel_tool_calls=False).invoke(messages))
typed = [
    chat.with_structured_output(Forecast, method=method).invoke("Paris, please.").model_dump()
    for method in ("json_schema", "function_calling")
]
print(
    json.dumps(
        {
            "called": answer.tool_calls,
            "streamed": streamed.tool_calls,
            "loop": [message.type for message in messages],
            "typed": typed,
        }
    )
)
