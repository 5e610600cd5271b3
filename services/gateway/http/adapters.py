"""The endpoints by which operators give LoRA adapters names: vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.responses import PlainTextResponse, Response

from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.authentication import Authenticator, caller
from octavo.services.gateway.http.endpoint import Handler, HttpRequest
from octavo.services.gateway.http.errors import in_openai_words
from octavo.services.gateway.http.params import Params
from octavo.services.gateway.requests.adapters import Adapters, resolved

_NAMES = {"name": "lora_name", "path": "lora_path"}


class AdapterEndpoints:
    """Loads and unloads. Admins may do it; without credentials anybody, with what is in the folder of adapters."""

    def __init__(self, adapters: Adapters, authenticator: Authenticator) -> None:
        self._adapters = adapters
        self._authenticator = authenticator
        self.routes: Sequence[tuple[str, str, Handler]] = (
            ("POST", "/v1/load_lora_adapter", self.load),
            ("POST", "/v1/unload_lora_adapter", self.unload),
        )

    async def load(self, request: HttpRequest) -> Response:
        """Load an adapter and give it a name; one that is in use means the new adapter from then on."""
        params = Params(await request.json(), ignored=request.ignored)
        name, path = _text(params, "lora_name"), _text(params, "lora_path")
        params.finish()
        try:
            self._check_may(name, resolved(path))
            await self._adapters.load(name, path)
        except ServingError as error:
            raise in_openai_words(error, _NAMES) from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: HttpRequest) -> Response:
        """Take a name away. What runs with the adapter goes on."""
        params = Params(await request.json(), ignored=request.ignored)
        name = _text(params, "lora_name")
        params.finish()
        try:
            self._check_may(name)
            self._adapters.unload(name)
        except ServingError as error:
            raise in_openai_words(error, _NAMES) from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _check_may(self, name: str, *paths: Path) -> None:
        """Raise PERMISSION_DENIED unless the caller may change what a name means, to the adapter in `paths`."""
        if self._authenticator.is_required:
            if not caller().is_admin:
                raise ServingError(Reason.PERMISSION_DENIED, "this needs a key made with `octavo keys add --admin`")
            return
        folder = self._adapters.folder
        known = self._adapters.path_of(name)
        concerned = paths if known is None else (*paths, known)
        if folder is None or not all(path.is_relative_to(folder.resolve()) for path in concerned):
            message = "a server without --api-keys loads and unloads adapters of its --adapter-dir only"
            raise ServingError(Reason.PERMISSION_DENIED, message)


def _text(params: Params, name: str) -> str:
    text = params.text(name)
    if not text:
        raise params.wrong(name, "must be set")
    return text
