"""A FastAPI backend with a fleet in it; started by uvicorn from test_end_to_end."""

import os
from pathlib import Path

from fastapi import FastAPI

from tunefleet import Fleet

fleet = Fleet(store_url=(Path(__file__).parent / "store").as_uri(), idle_timeout_s=60)
app = FastAPI(lifespan=fleet.lifespan)
app.mount("/ai", fleet.asgi(auth="none"))


@app.get("/hello/{user_id}")
async def hello(user_id: str, question: str) -> dict[str, object]:
    messages = [{"role": "user", "content": question}]
    answer = await fleet.chat(user_id, messages, temperature=0, max_tokens=16)
    return {"text": answer.text, "worker": os.getpid(), "host": (await fleet.status()).host_pid}
