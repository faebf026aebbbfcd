r"""Patterns of JSON Schema's string formats that have an end.

The grammar compiler's own know no leap years, and let a small model go on for ever: `P12121212...`,
`1.1.1.1.1...`. Everything that a pattern matches has the format; very long texts that have it do not match.
"""

from __future__ import annotations

# No leap seconds: whether one is valid depends on the time zone.
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_DATE = (
    r"(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8]))"
    r"|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
# RFC 3339, appendix A: a unit may only be followed by the next smaller one.
_N = r"\d{1,6}"
_CLOCK = rf"T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_DAYS = rf"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"
_DURATION = rf"P(?:{_DAYS}(?:{_CLOCK})?|{_CLOCK}|{_N}W)"
# A host has at most 253 characters, a label 63 (RFC 1035), and what precedes an address's @ 64 (RFC 5321).
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,22}[A-Za-z0-9])?"
_LONG_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"(?:{_LONG_LABEL}\.)?(?:{_LABEL}\.){{0,5}}[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@(?:{_LONG_LABEL}\.)?(?:{_LABEL}\.){{1,4}}[A-Za-z]{{2,24}}"
# RFC 3986, without user names and IPv6 addresses, and without `//` only for schemes that are in use.
_IPV4 = r"(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_CHARACTER = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_CHARACTERS = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})"
_REST = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})"
_OPAQUE = "about|arn|bitcoin|blob|cid|data|did|doi|geo|magnet|mailto|news|pkg|sms|spotify|tag|tel|urn"
_URI = (
    rf"(?:[A-Za-z][A-Za-z0-9+.-]{{0,15}}://(?:{_HOST}|{_IPV4})(?::\d{{1,5}})?(?:/{_CHARACTERS}{{0,400}})?"
    rf"|file:///{_CHARACTERS}{{0,400}}|(?:{_OPAQUE}):{_CHARACTER}{_CHARACTERS}{{0,400}})"
    rf"(?:\?{_REST}{{0,400}})?(?:#{_REST}{{0,100}})?"
)

PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": _DURATION,
    "email": _EMAIL,
    "hostname": _HOST,
    "uri": _URI,
    "byte": r"(?:[A-Za-z0-9+/]{4}){0,400}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",  # OpenAPI: base64
}

# The compiler's own, written out for texts that are not JSON, which it cannot match; IPv6 has none.
PLAIN_PATTERNS = {
    **PATTERNS,
    "ipv4": _IPV4,
    "uuid": r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
}
