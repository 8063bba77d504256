//! Memory that tells whether it is the same: filled from a seed, with a checksum over all of it.

const WORDS_PER_MIB: usize = (1 << 20) / size_of::<u64>();

/// Pseudo-random words (xorshift64). No stretch of its period of 2^64 - 1 comes twice, so no two pages are equal.
pub(crate) fn fill(mib: usize, seed: u64) -> Vec<u64> {
    let mut memory = vec![0; mib * WORDS_PER_MIB];
    // Seeds that differ by one must not give nearly equal data, and a state of zero would stay zero.
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15).max(1);
    for word in &mut memory {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state;
    }
    memory
}

/// Covers each word and its place. Four lanes, because one alone would wait for its own multiplications.
pub(crate) fn checksum(memory: &[u64]) -> u64 {
    const PRIME: u64 = 0x9e37_79b1_85eb_ca87;
    let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(PRIME).rotate_left(29);
    let mut lanes = [1, 2, 3, 4];
    for words in memory.chunks_exact(lanes.len()) {
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = mix(*lane, *word);
        }
    }
    lanes.into_iter().fold(memory.len() as u64, mix)
}
