import pytest

from ropeway.runtime.environment import RENAMED, VARIABLES, check_renamed
from ropeway.runtime.errors import ConfigError


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_variable_set_under_its_old_name_is_refused_with_the_new_one(old, new):
    with pytest.raises(ConfigError, match=rf"{old}.*{new}"):
        check_renamed({old: "1"})
    check_renamed({new: "1"})
    assert new in {variable.name for group in VARIABLES.values() for variable in group}
