"""What a profile may be called: it is also its model's name in the registry, part of paths and of S3 keys."""

import re

PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}[A-Za-z0-9]|[A-Za-z0-9]")
