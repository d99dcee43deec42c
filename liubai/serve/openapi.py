"""The server's description of itself (OpenAPI 3.1), made from the very models that check what is asked."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from liubai import __version__
from liubai.serve import shapes
from liubai.serve.house import House
from liubai.serve.schema import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"
#: What each status means, for the paths that answer.
STATUSES = {
    "400": "The request is not one that can be answered.",
    "401": "A valid API key is needed.",
    "404": "There is no such model.",
    "408": "The request did not arrive in time.",
    "413": "The request is too long.",
    "415": "The request is not application/json.",
    "421": "The server is not called by this name.",
    "429": "Too many requests; see Retry-After.",
    "500": "The server had an error.",
    "503": "The model is not available, or the server is being stopped; see Retry-After. Without it and with "
    "X-Should-Retry: false, the answer took too long, and would again.",
}


def document(house: House) -> dict[str, Any]:
    """Bounds that this server was started with are in it."""
    models = (
        ChatRequest,
        CompletionRequest,
        shapes.ChatCompletion,
        shapes.Completion,
        shapes.Model,
        shapes.ModelList,
        shapes.Health,
        shapes.Problem,
    )
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas = found["$defs"]
    limits = house.limits
    schemas["ChatRequest"]["properties"]["messages"]["maxItems"] = limits.messages
    if limits.max_tokens is not None:
        for name in ("ChatRequest", "CompletionRequest"):
            for field in ("max_tokens", "max_completion_tokens"):
                for form in schemas[name]["properties"].get(field, {}).get("anyOf", []):
                    if form.get("type") == "integer":
                        form["maximum"] = limits.max_tokens
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Liubai",
            "version": __version__,
            "description": "OpenAI's interface, with thoughts.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _post("chat", "Answer a conversation.", ChatRequest, shapes.ChatCompletion)
            },
            "/v1/completions": {
                "post": _post("completion", "Go on with a text.", CompletionRequest, shapes.Completion)
            },
            "/v1/models": {"get": _get("models", "Which models there are.", shapes.ModelList)},
            "/v1/models/{model}": {
                "get": {
                    **_get("model", "One model.", shapes.Model, ("404",)),
                    "parameters": [
                        {
                            "name": "model",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "minLength": 1, "maxLength": 256},
                        }
                    ],
                }
            },
            "/health": {
                "get": {
                    "operationId": "health",
                    "summary": "Is it ready to answer?",
                    "responses": {
                        "200": _json("It is.", shapes.Health),
                        "503": _json("Not now.", shapes.Health),
                        "421": _problem("421"),
                    },
                    "security": [],
                }
            },
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "Figures for Prometheus.",
                    "responses": {
                        "200": {
                            "description": "Figures.",
                            "content": {"text/plain": {"schema": {"type": "string"}}},
                        },
                        "401": _problem("401"),
                        "421": _problem("421"),
                    },
                }
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(name: str, text: str, asked: type, answered: type) -> dict[str, Any]:
    whole = _json("The answer; a stream of events when 'stream' is true.", answered)
    whole["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "operationId": name,
        "summary": text,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(asked)}}},
        "responses": {"200": whole, **{status: _problem(status) for status in STATUSES}},
    }


def _get(name: str, text: str, answered: type, more: tuple[str, ...] = ()) -> dict[str, Any]:
    problems = {status: _problem(status) for status in ("401", "421", "500", *more)}
    return {
        "operationId": name,
        "summary": text,
        "responses": {"200": _json("What was asked.", answered), **problems},
    }


def _problem(status: str) -> dict[str, Any]:
    found = _json(STATUSES[status], shapes.Problem)
    if status in ("429", "503"):
        found["headers"] = {
            "Retry-After": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
            "X-Should-Retry": {"description": "Not with Retry-After.", "schema": {"const": "false"}},
        }
    return found


def _json(text: str, model: type) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ref(model)}}}


def _ref(model: type) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
