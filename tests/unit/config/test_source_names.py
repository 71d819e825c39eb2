"""The name of a source is that of a folder."""

import pytest

from ropeway.config.load_params import load_profiles
from ropeway.config.sections import SOURCE_NAME
from ropeway.runtime.errors import ConfigError
from tests.support.shipped_params import SHIPPED, read_shipped_params


@pytest.mark.parametrize("name", ["../x", "..", ".hidden", "a/b", "a\\\\b", "a\\nb", "", "x" * 81])
def test_a_name_that_leaves_its_folder_is_refused(name):
    text = read_shipped_params().replace("docstrings:", f'"{name}":')
    with pytest.raises(ConfigError, match="cannot be a source's name"):
        load_profiles(SHIPPED, text=text)


@pytest.mark.parametrize("name", ["orca-chat", "my notes", "\u00e4.b", "x" * 80])
def test_other_names_are_kept(name):
    assert SOURCE_NAME.fullmatch(name)
    assert (
        name
        in load_profiles(SHIPPED, text=read_shipped_params().replace("docstrings:", f'"{name}":'))[1]["laptop"].sources
    )
