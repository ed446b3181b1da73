from fttrain.data.batch import IGNORE, collate


def test_targets_stay_inside_their_document() -> None:
    batch = collate([([5, 6, 7], [IGNORE, 6, 7]), ([8, 9], [8, 9])], index=3)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.targets.tolist() == [6, 7, IGNORE, 9, IGNORE]  # 7 never predicts 8
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.lengths == (3, 2)
    assert (batch.index, batch.valid_tokens) == (3, 3)


def test_empty_documents_and_empty_batches() -> None:
    batch = collate([([], []), ([8, 9], [8, 9]), ([], [])], index=0)
    assert batch.lengths == (2,)
    assert batch.targets.tolist() == [9, IGNORE]
    empty = collate([], index=1)
    assert (len(empty.input_ids), len(empty.targets), empty.lengths) == (0, 0, ())
    assert empty.valid_tokens == 0
