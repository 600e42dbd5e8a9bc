"""A Starlette backend with a fleet in it; started by uvicorn from test_end_to_end."""

import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from tunefleet import Fleet

fleet = Fleet(store_url=(Path(__file__).parent / "store").as_uri(), idle_timeout_s=60)


async def hello(request: Request) -> JSONResponse:
    messages = [{"role": "user", "content": request.query_params["question"]}]
    answer = await fleet.chat(request.path_params["user_id"], messages, temperature=0, max_tokens=16)
    return JSONResponse({"text": answer.text, "worker": os.getpid(), "host": (await fleet.status()).host_pid})


app = Starlette(
    routes=[Route("/hello/{user_id}", hello), Mount("/ai", fleet.asgi(auth="none"))], lifespan=fleet.lifespan
)
