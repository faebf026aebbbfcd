"""What the administrator can set: one dataclass, and the parsing of values that have a form of their own."""

from tgi_asgi.settings.declare import flag_of
from tgi_asgi.settings.settings import DEMO_MODEL, MIB, OWN_VARIABLES, GivenRope, Settings

__all__ = ["DEMO_MODEL", "MIB", "OWN_VARIABLES", "GivenRope", "Settings", "flag_of"]
