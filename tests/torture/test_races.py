"""Two commands that want the same folder at the same moment: one works, the other is told who does."""

import re
from collections.abc import Callable

from commands import Undisturbed, Work, state_of

from labelwise.rundir import RunDirectory


def test_of_two_commands_on_one_folder_one_works_and_one_is_told(
    work: Work, undisturbed: Undisturbed, tally: Callable[..., None], is_long: bool
) -> None:
    refused = 0
    for trial in range(20 if is_long else 4):
        run = RunDirectory(work.folder / f"{trial}")
        both = [work.start("pretrain", run.path) for _ in range(2)]
        codes = [command.wait() for command in both]
        assert sorted(codes) in ([0, 0], [0, 2]), [command.words for command in both]
        if codes == [0, 0]:  # one began when the other was through
            assert sum("is pretrained already" in command.words for command in both) == 1
        for command, code in zip(both, codes, strict=True):
            other = both[1 - both.index(command)]
            words = " ".join(command.words.split())
            if code == 2:
                assert re.search(
                    rf"process {other.pid} on .* is working on it|another (labelwise )?command", words
                )
        assert state_of(run) == undisturbed.states["pretrain"]
        refused += 2 in codes
        tally("race of two commands for one folder", codes.count(2))
    assert refused
