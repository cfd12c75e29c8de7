"""Connects to the jobs API of a running Ray cluster: Ray's own client, with our token, time limit and errors.

A cluster that was started with a token demands it from every client and from the job, whose nodes have their own. The
token never becomes part of the job, because the dashboard shows a job's settings. Only `connect` imports Ray.
"""

import os
import re
from pathlib import Path
from typing import Any

from launch.site import Site
from nulsq.errors import InputError, require

SECONDS = 30  # time limit for connecting, and for each part of an answer
PLACES = "the site's `token`, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token"  # where a token may be


def find_token(site: Site) -> str | None:
    """The cluster's token, if there is one in PLACES, where Ray looks too. Raises InputError for an unusable file."""
    if site.token is None and os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if site.token is None and "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    named = site.token or os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    if named is None and not path.exists():
        return None
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise InputError(f"token = {path}: cannot be read ({error.strerror})") from None
    if len(token.split()) != 1:
        raise InputError(f"token = {path}: holds no token, which is one word")
    return token


def connect(site: Site) -> Any:
    """A `ray.job_submission.JobSubmissionClient` for the site's cluster.

    Its requests raise InputError where the jobs API does not answer, refuses the token or fails. They raise
    RuntimeError where the API rejects a request, for example for a job that it does not know.
    """
    require("ray.job_submission", "search")
    import ray.job_submission

    token, address = find_token(site), f"address = {site.address}"

    class Client(ray.job_submission.JobSubmissionClient):
        # `_do_request` is private: the public methods take no time limit, and a server that accepts a connection but
        # never answers would block them forever.
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            try:
                response = super()._do_request(*arguments, timeout=SECONDS, **options)
            except ray.exceptions.AuthenticationError:  # status 401 or 403
                raise InputError(f"{address}: it {'refuses the token' if token else 'demands a token'}, looked for in "
                                 f"{PLACES}. Copy the token of the cluster's head and name the file in the site's "
                                 "`token`") from None
            except OSError as error:
                raise InputError(f"{address}: no jobs API answers there ({_cause(str(error))}). It is part of the "
                                 "dashboard: pip install \"ray[default]\" on the head, ray start --head "
                                 "--include-dashboard=true; from elsewhere ssh -L 8265:127.0.0.1:8265 HEAD") from None
            if response.status_code >= 500:
                raise InputError(f"{address}: its jobs API fails ({response.status_code}: {_cause(response.text)})")
            return response

    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray's client prefers them to the address that it is given
        os.environ.pop(name, None)
    try:
        return Client(site.address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:  # the answer is no version of Ray's
        raise InputError(f"{address}: something answers there, but not the jobs API of a Ray cluster "
                         f"({_cause(str(error))})") from None


def _cause(text: str) -> str:
    """The innermost cause of a connection error, or the last line of a server's traceback, in one line."""
    causes = re.findall(r"\[Errno -?\d+\] [\w ]+|^[\w.]+(?:Error|Exception): .*", text, re.MULTILINE) or [text]
    cause = " ".join(causes[-1].split())[:400]
    if "No available agent" in cause:
        cause += ("; the head's agent has not started yet, or another Ray on that machine has its port: ray start "
                  "--dashboard-agent-listen-port=N there gives it another one")
    return cause
