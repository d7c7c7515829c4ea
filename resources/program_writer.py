"""A language model behind any OpenAI-compatible endpoint: one bounded POST per answer, classified and retried.

What it is asked and what is made of its answer is in training/zero_shot/answering/writers.py; its key is never shown.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import SecretStr

from graft_pipeline.errors import InputError, ServiceError, SettingsError
from graft_pipeline.settings import Settings
from resources.http import (
    TRANSIENT_STATUSES,
    USER_AGENT,
    Answer,
    BodyTooLargeError,
    HttpPool,
    Redaction,
    Retries,
    TransientError,
    UnreachableError,
    host_of,
    is_http_url,
)

logger = logging.getLogger(__name__)

#: An answer is a few lines; whatever is larger is none.
_MAX_BYTES = 1 << 20
#: Somebody waits for the answer: about ten seconds of trouble are outlasted, not a minute as in a collection.
_ATTEMPTS = 4
#: 429 with one of these codes does not pass with time.
_OUT_OF_CREDIT = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
#: 400 with one of these is about this question alone; others may be answered.
_OF_THE_QUESTION = frozenset({"content_filter", "context_length_exceeded"})


class ProgramModel:
    """Chat completions, as OpenAI, vLLM, Ollama, llama.cpp and others serve them.

    Our own HTTP pool, not the `openai` package: one POST of a settled format needs its pool, retries and redaction,
    which are here already, and none of its other endpoints.

    Args:
        url: base address, such as `https://api.openai.com/v1` or `http://localhost:11434/v1`.
        model: name of the model there.
        key: sent as bearer token; None where the endpoint asks for none.
        max_tokens: longest answer.
        seed: of the sampling, which is greedy anyway.
        timeout_s: limit of a whole answer.
        retries: attempts and waits per answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: SecretStr | None = None,
        *,
        max_tokens: int = 400,
        seed: int = 0,
        timeout_s: float = 60.0,
        retries: Retries | None = None,
    ) -> None:
        if not is_http_url(url):
            raise SettingsError(f"The endpoint {host_of(url)!r} is no http(s) URL: correct GRAFT_ANSWER_URL.")
        self._url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._model = model
        self._key = _printable(key)
        self._options: dict[str, Any] = {"temperature": 0, "seed": seed, "max_tokens": max_tokens}
        self._retries = retries or Retries(_ATTEMPTS)
        self._pool = HttpPool(connections=1, timeout_s=timeout_s, deadline_s=timeout_s)
        self._redaction = Redaction([self._key] if self._key else [])

    @classmethod
    def from_settings(cls, settings: Settings, *, retries: Retries | None = None) -> "ProgramModel":
        """The model of a deployment.

        Args:
            settings: names endpoint, model, key and limits.
            retries: attempts and waits per answer.

        Raises:
            SettingsError: if no endpoint is named, or the key cannot be one.
        """
        if settings.answer_url is None or settings.answer_model is None:
            raise SettingsError(
                "No language model is named: set GRAFT_ANSWER_URL (such as http://localhost:11434/v1), "
                "GRAFT_ANSWER_MODEL and, where it asks for one, GRAFT_ANSWER_KEY; or use the grammar, which needs none."
            )
        return cls(
            settings.answer_url,
            settings.answer_model,
            settings.answer_key,
            max_tokens=settings.answer_max_tokens,
            seed=settings.seed,
            timeout_s=settings.answer_timeout_s,
            retries=retries,
        )

    def __repr__(self) -> str:
        return f"ProgramModel({host_of(self._url)}, {self._model!r})"

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Ask for the next message of a conversation.

        Args:
            messages: `role` (system, user, assistant) and `content` of each.

        Returns:
            The answer's text.

        Raises:
            SettingsError: if key, address or model are refused.
            InputError: if it has no answer to this conversation: refused, cut off, or empty.
            ServiceError: if the endpoint is not there, keeps failing, or answers something else.
        """
        try:
            return self._retries.call(lambda: self._ask(messages))
        except TransientError as error:
            raise ServiceError(
                f"{host_of(self._url)} gave no answer ({error}): check that it runs and that GRAFT_ANSWER_URL and "
                "GRAFT_ANSWER_MODEL name it, then ask again."
            ) from None

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        while True:
            content = {"model": self._model, "messages": list(messages), **self._options}
            try:
                answer = self._pool.request(
                    "POST", self._url, body=json.dumps(content), headers=headers, max_bytes=_MAX_BYTES
                )
            except (TimeoutError, ConnectionError) as error:
                unreachable = isinstance(error, UnreachableError)
                raise TransientError("unreachable", str(error), is_unreachable=unreachable) from None
            except BodyTooLargeError as error:
                raise ServiceError(
                    f"{host_of(self._url)} answered {error}: that is no chat completion, check GRAFT_ANSWER_URL."
                ) from None
            if answer.status == 200:
                return self._text(answer)
            if not (answer.status == 400 and self._drop_refused_option(answer)):
                raise self._failure(answer)

    def _drop_refused_option(self, answer: Answer) -> bool:
        """Do without an option that this model does not take; whether there was one. Each goes once at most."""
        refused = _error_of(answer).get("param")
        if refused not in self._options:
            return False
        value = self._options.pop(refused)
        if refused == "max_tokens":
            self._options["max_completion_tokens"] = value
        logger.warning("%s takes no %s: asked without it", self._model, refused)
        return True

    def _failure(self, answer: Answer) -> Exception:
        error = _error_of(answer)
        said = self._redaction.redact(str(error.get("message") or answer.reason))[:200]
        host, status = host_of(self._url), answer.status
        if status in (401, 403):
            return SettingsError(f"{host} refused the key ({status}: {said}): check GRAFT_ANSWER_KEY.")
        if status == 404:
            return SettingsError(
                f"{host} has no such model or address ({said}): check GRAFT_ANSWER_URL, which usually ends in /v1, "
                "and GRAFT_ANSWER_MODEL."
            )
        if error.get("code") in _OF_THE_QUESTION:
            return InputError(f"{host} refused the question ({said}): put it in other words.")
        if error.get("code") in _OUT_OF_CREDIT:
            return ServiceError(f"{host} is out of credit ({said}): check the account's plan.")
        if status in TRANSIENT_STATUSES:
            return TransientError("unavailable", f"{status}: {said}", retry_after_s=answer.retry_after_s)
        return ServiceError(f"{host} refused the question ({status}: {said}): check GRAFT_ANSWER_MODEL.")

    def _text(self, answer: Answer) -> str:
        try:
            choice = json.loads(answer.body)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise TransientError("malformed", "its answer is no chat completion", is_quick=True) from None
        if choice.get("finish_reason") == "length":
            raise InputError(
                f"{self._model} was cut off at its longest answer: raise GRAFT_ANSWER_MAX_TOKENS, or ask for less."
            )
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{self._model} answered nothing: put the question in other words.")
        return text


def _printable(key: SecretStr | None) -> str | None:
    """A key without the line end that a mounted file has; None: there is none."""
    text = key.get_secret_value().strip() if key else ""
    if not (text.isascii() and text.isprintable()):
        raise SettingsError(
            "GRAFT_ANSWER_KEY holds a character that no key has, such as a typographic quote: copy the key anew."
        )
    return text or None


def _error_of(answer: Answer) -> dict[str, Any]:
    """The `error` object of an answer, as OpenAI words it; servers that only say a string have a message."""
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {"message": error}
