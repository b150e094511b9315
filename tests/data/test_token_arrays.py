import numpy as np

from notus.data.token_arrays import TokenizedPairs


def test_flat_arrays():
    lengths = np.array([[2, 1, 3], [1, 2, 1]])
    pairs = TokenizedPairs(np.arange(10, dtype=np.int32), np.zeros(10, bool), lengths)
    assert len(pairs) == 2
    assert pairs.starts.tolist() == [[0, 2, 3], [6, 7, 9]]
    assert pairs.response_starts.tolist() == [0, 4, 7]
    parts = [[pairs.tokens[part].tolist() for part in pairs.parts(i)] for i in range(2)]
    assert parts == [[[0, 1], [2], [3, 4, 5]], [[6], [7, 8], [9]]]


def test_fingerprint_tells_sets_apart():
    def pairs(tokens=(5, 6, 7, 8), hidden=(0, 0, 0, 0), lengths=((2, 1, 1),)):
        arrays = np.array(tokens, np.int32), np.array(hidden, bool), np.array(lengths, np.int64)
        return TokenizedPairs(*arrays).fingerprint()

    others = [pairs(tokens=(5, 6, 8, 7)), pairs(hidden=(0, 1, 0, 0)), pairs(lengths=((1, 2, 1),))]
    assert pairs() == pairs()
    assert len({pairs(), *others}) == 4
