"""Locust's own HTTP users: a task on TGI's route, the same on OpenAI's, a chat, a stream."""

from __future__ import annotations

from locust import HttpUser, constant, task  # type: ignore[import-not-found]

REVIEW = "A warm, funny and moving film.\nSentiment:"


class Caller(HttpUser):  # type: ignore[misc]
    wait_time = constant(0)

    @task
    def generate(self) -> None:
        body = {"inputs": REVIEW, "parameters": {"max_new_tokens": 4}}
        self.client.post("/generate?task=films", json=body, name="/generate")

    @task
    def complete(self) -> None:
        body = {"model": "films", "prompt": REVIEW, "max_tokens": 4, "temperature": 0}
        self.client.post("/v1/completions", json=body, name="/v1/completions")

    @task
    def chat(self) -> None:
        body = {"model": "tgi", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        self.client.post("/v1/chat/completions", json=body, name="/v1/chat/completions")

    @task
    def stream(self) -> None:
        body = {"inputs": REVIEW, "parameters": {"max_new_tokens": 4}}
        path, name = "/generate_stream?task=films", "/generate_stream"
        with self.client.post(path, json=body, name=name, stream=True, catch_response=True) as answer:
            events = [line for line in answer.iter_lines(decode_unicode=True) if line]
            if '"generated_text": null' in events[-1] or "error" in events[-1]:
                answer.failure(f"the last event is no whole answer: {events[-1][:200]}")
