"""Who of those that wait enters next."""

from polydelta.engine.policies.by_name import POLICIES as POLICIES
from polydelta.engine.policies.policy import Policy as Policy
