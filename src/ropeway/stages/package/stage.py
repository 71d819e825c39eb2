"""Room: package. The run's model as others load it, its facts and its lineage, proved in a clean process.

package/*.safetensors, model.safetensors.index.json   weights in `package.dtype`, shards of `max_shard_bytes` at most
package/config.json, generation_config.json           read alike by transformers 4.31 to 5
package/tokenizer.json, tokenizer_config.json,
        special_tokens_map.json, chat_template.jinja  the base's tokenizer with the role tokens; the template both ways
package/card.json                                     what the model card states (NOTICE.txt: what Llama 2 asks for)
package/run.json, run.yaml                            what determines the model; its block of params.yaml, as written
package/eval.json, samples.json, steps.csv,
        ledger.json                                   as the earlier stages wrote them
package/probe.json                                    `python -m ropeway.stages.package.check` compares with it
package/manifest.json                                 written last
"""

from ropeway.config.params import Profile
from ropeway.runtime.workspace import Workspace


def check_request(workspace: Workspace, profile: Profile) -> None:
    """Raise now, before anything is trained, what would end this stage whatever the trained model is.

    Raises:
        ConfigError: The profile's block of params.yaml means something else when it is cut out.
        DataError: Manifests of raw, base and data do not belong together, or the ledger is missing.
    """
    from ropeway.stages.package.build import check_request as check

    check(workspace, profile)


def run(workspace: Workspace, profile: Profile) -> None:
    """Leave `package/`; there is none unless a fresh interpreter loaded it and found what was promised.

    Raises:
        DataError: The rooms' files do not belong together, a weight does not fit the dtype, or the reloaded package
            differs from the model in logits, frequencies, tokens, template or stop token.
    """
    from ropeway.stages.package.build import build_package

    build_package(workspace, profile)
