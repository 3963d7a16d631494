"""Find and mask passwords, tokens and keys in text.

detect-secrets recognizes the tokens of many services by their form; `RULES` adds forms that it lacks. Its entropy and
keyword rules are not used: records are full of digests, and studies contain prose. Passwords have no form, so they are
recognized by the name before them, as in `password=...`.

The time is linear in the length of any text. No rule here rescans a long stretch from each of its characters, and the
library's rules are applied to pieces of bounded length.
"""

import re
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

PLUGINS = {  # modules and classes of detect-secrets whose rules match the form of a token
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "cloudant": "CloudantDetector",
    "discord": "DiscordBotTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "mailchimp": "MailchimpDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "softlayer": "SoftlayerDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
PIECE = 4096  # characters in a piece of text to which the library's rules are applied
LONGEST = 1024  # characters by which a piece overlaps the next one: the longest token that is found whole
HEAD = 200  # characters at the start of a value that decide whether it is a secret
PASSES = 5  # passes of masking; a text that still contains secrets after them is replaced entirely

RULES = {  # the group `secret` is masked; a rule without that group masks the whole match
    name: re.compile(rule)
    for name, rule in {
        "private key": r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,20}-----"
        r"(?:(?:(?!-----)[\s\S])*+-----END [A-Z0-9 ]{0,60}-----|(?:\s{0,3}[A-Za-z0-9+/=\\]{16,}+)*+)",
        "JSON web token": r"(?<![\w-])eyJ[A-Za-z0-9_-]{10,}+\.eyJ[A-Za-z0-9_-]{10,}+(?:\.[A-Za-z0-9_-]*)?",
        "password in a URL": r":/{1,2}[^/\s:@]*+:(?P<secret>(?![*<{]|\$[A-Z_{(])[^/\s@]++)@",
        "token in a URL": r"(?::/|https?:|s3:|gs:)/(?P<secret>[^/\s:@]{16,}+)@",
        "webhook": r"(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/(?P<secret>[\w/-]{20,})",
        "signed URL": r"[?&;](?:sig|[Ss]ignature|X-(?:Amz|Goog)-Signature|key)=(?P<secret>[^&\s\"'*]{16,})",
        "Authorization header": r"(?:\b(?i:bearer)[ \t]{1,3}(?=[^\s\d\"']{0,200}\d)"
        r"|(?i:authorization)[\"']?: ?[\"']?(?i:basic)[ \t]{1,3})(?P<secret>[^\s\"'*<{$][^\s\"']{7,})",
        "token of a service": r"(?<![A-Za-z0-9])(?:(?:gh[oprsu]_|github_pat_|hf_|npm_|dckr_pat_|dop_v1_|shpat_|r8_"
        r"|whsec_|AKC|[rs]k_(?:live|test)_)(?=[A-Za-z0-9]{16})|AIza|GOCSPX-|ya29\.|nvapi-|ATATT|xapp-)[A-Za-z0-9_-]{16,}",
        "key of a service": r"(?<![\w-])(?:sk|xox[abeprs])-(?=[A-Za-z_-]{0,200}\d)(?:[a-z0-9]+-)*[A-Za-z0-9_]{16,}"
        r"[A-Za-z0-9_-]*",
    }.items()
}
NAMED = re.compile(  # the name before a secret value
    r"(?P<asked>(?<![\w-])--(?:[a-z]+-){0,4}|\blogin\s{1,3}\S{1,200}\s{1,3})?"
    r"(?:(?P<sure>pass(?:word|wd|phrase)|(?:db|database|user|smtp|mail|key)_?pass"
    r"|(?:secret|api|access|account|auth|signing)[_-]?key|client[_-]?secret"
    r"|(?:access|api|auth|refresh|session)[_-]?token)"
    r"|(?P<likely>secret|credentials?|pwd|(?<![a-z])pass)|token|auth)"
    r"(?:[\\\"'`\]]{0,4}[ \t]{0,3}(?::?(?P<equals>={1,2}>?)|:)|(?(asked)(?=\s)|(?!)))[ \t]{0,3}"
    r"\\{0,2}(?P<quote>[\"'`])?",
    re.IGNORECASE,
)
NO_SECRET = re.compile(  # values that are not secrets: masks, variables, placeholders, keywords
    r"[*<{%\[(]|\.\.\.|\$[A-Z_{(]|(?:[A-Z]+_)*(?:PASSWORD|SECRET|TOKEN|KEY|TEXT|VALUE|X+)(?!\w)"
    r"|(?i:none|null|true|false|required|optional|empty|unset|str)(?!\w)"
)
REST = re.compile(r"[\w-]*")  # the rest of a token that is longer than the match of the library's rule
MIXED = re.compile(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])")
VALUES = {None: re.compile(r"[^\s\"'`]*")} | {quote: re.compile(rf"[^\n{quote}]*") for quote in "\"'`"}
DIGEST = re.compile(r"[0-9a-f]{0,64}")  # records hold thousands of digests, and no secret has this form
RANDOM = re.compile(r"(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{16}")


class Find(NamedTuple):
    """A secret in a text, and the rule that found it."""

    start: int
    end: int
    rule: str


@cache
def _library() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Return the library's rules with their names. The import is here because it takes a quarter of a second."""
    plugins = (getattr(import_module(f"detect_secrets.plugins.{module}"), name) for module, name in PLUGINS.items())
    return tuple((plugin.secret_type, rule) for plugin in plugins for rule in plugin.denylist)


def finds(text: str) -> list[Find]:
    """Return the parts of a text that look like a password, token or key, by position. Overlapping finds are merged."""
    merged: list[Find] = []
    for find in sorted({*_by_form(text), *_by_name(text), *_by_library(text)}):
        if merged and find.start < merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(find.end, merged[-1].end))
        else:
            merged.append(find)
    return merged


def _by_form(text: str) -> Iterator[Find]:
    for name, rule in RULES.items():
        for match in rule.finditer(text):
            yield Find(*match.span("secret" if rule.groups else 0), name)


def _by_library(text: str) -> Iterator[Find]:
    for start in range(0, len(text), PIECE):
        for name, rule in _library():
            for match in rule.finditer(text, start, start + PIECE + LONGEST):
                if match.start() >= start + PIECE:  # the next piece finds it
                    break
                yield Find(match.start(), _end(REST, text, match.end(), LONGEST), name)


def _by_name(text: str) -> Iterator[Find]:
    at = 0
    while named := NAMED.search(text, at):
        at, value = named.end(), VALUES[named["quote"]]
        if _lets_in(named, text[at : _end(value, text, at, HEAD)]):
            start, at = at, _end(value, text, at, len(text))
            yield Find(start, at, "password or token by its name")


def _end(rule: re.Pattern[str], text: str, start: int, most: int) -> int:
    """Return the end of a rule's match at `start`, which covers at most `most` characters; `start` without a match."""
    found = rule.match(text, start, start + most)
    return start if found is None else found.end()


def _lets_in(named: re.Match[str], value: str) -> bool:
    """Whether a value after a match of `NAMED` is a secret. An assigned or quoted value after a sure name always is.
    Any other value, such as one after a colon in prose, must mix letters and digits."""
    if NO_SECRET.match(value):
        return False
    if named["sure"] and (named["equals"] or named["quote"]):
        return len(value) >= 3
    if named["sure"] or (named["likely"] and (named["equals"] or named["quote"] or named["asked"])):
        return len(value) >= 6 and MIXED.match(value) is not None
    return RANDOM.match(value) is not None


def masked(text: str) -> str:
    """Return the text with everything that looks like a password, token or key replaced by `***`."""
    for _ in range(PASSES):
        found = finds(text)
        if not found:
            return text
        for find in reversed(found):
            text = f"{text[: find.start]}***{text[find.end :]}"
    return "***"


def secrets(value: Any, name: str = "", key: str = "") -> Iterator[str]:
    """Yield a message for each text inside a value that looks like a secret. The message does not contain the text."""
    if isinstance(value, dict):
        for each, inside in value.items():
            yield from secrets(inside, f"{name}.{each}" if name else str(each), str(each))
    elif isinstance(value, list | tuple):
        for number, inside in enumerate(value):
            yield from secrets(inside, f"{name}[{number}]", key)
    else:
        text = value if isinstance(value, str) else ""
        if DIGEST.fullmatch(text) and _is_plain(key):
            return
        before = f"{key}=" if key else ""  # so that {"password": "..."} is found too
        for find in finds(before + text)[:1]:
            place = f"at character {find.start - len(before) + 1}" if find.start >= len(before) else "in its name"
            yield (
                f"{masked(name)} holds what looks like a secret ({find.rule}, {find.end - find.start} characters "
                f"{place}); allowed: text without a secret, since it is recorded and reported"
            )


@lru_cache(maxsize=1024)
def _is_plain(key: str) -> bool:
    """Whether a field's name neither contains a secret nor marks its value as one."""
    return not NAMED.search(f"{key}=") and not finds(key)
