"""Bodies of requests: JSON objects, within a bound on how many values are in them."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Final, NoReturn

from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.offload.long_json import count_marks, loads

MAX_MARKS: Final = 1 << 21
"""Most structural characters of a body, those in its texts included: so many values take some 150 MB."""
MAX_NESTED: Final = 1 << 18
"""Most lists and objects, all of which the collector of cycles looks at, in one go."""
MAX_NAMES: Final = 1 << 19
"""Most fields of objects; colons in texts count."""
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises MALFORMED_REQUEST. In a thread, if it is long."""
    if (num_marks := count_marks(data)) > MAX_MARKS:
        raise _malformed(f"it has {num_marks} brackets, braces, commas and colons; send at most {MAX_MARKS}")
    if (num_nested := data.count(b"[") + data.count(b"{")) > MAX_NESTED:
        raise _malformed(f"it has {num_nested} lists and objects; send at most {MAX_NESTED}")
    if (num_names := data.count(b":")) > MAX_NAMES:
        raise _malformed(f"it has {num_names} colons; send at most {MAX_NAMES}")
    try:
        body = loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _malformed(str(error)) from None
    except ValueError:
        raise _malformed(f"it has a number of more than {sys.get_int_max_str_digits()} digits") from None
    if not isinstance(body, dict):
        raise _malformed("it must be a JSON object")
    if _SURROGATE.search(data):
        try:
            for piece in json.JSONEncoder(ensure_ascii=False).iterencode(body):
                piece.encode()
        except UnicodeEncodeError:
            raise _malformed("it has half of a surrogate pair in it; send whole characters") from None
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"{name} is not JSON")


def _malformed(why: str) -> ServingError:
    return ServingError(Reason.MALFORMED_REQUEST, f"the body is not what it should be: {why}")
