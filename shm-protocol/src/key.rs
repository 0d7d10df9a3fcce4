//! From a key to its group. The same function everywhere: SDK, shim, agent, and later the kernel.
//!
//! A word-wise multiply hash: an FNV with a range reduction gave a fullest partition of 3.4 times the mean
//! (DESIGN.md, 6.1). The mixing step is the finaliser of MurmurHash3 (Austin Appleby, public domain).

/// Fixed slices of the key space: the unit that is owned and moved.
pub const KEY_GROUPS: usize = 256;

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLY: u64 = 0xd6e8_feb8_6659_fd93;

/// The hash of a key's bytes. Little-endian words of eight bytes, the last one padded with zeros; the length is part of it.
#[must_use]
pub fn hash_key(key: &[u8]) -> u64 {
    let mut hash = SEED ^ (key.len() as u64).wrapping_mul(MULTIPLY);
    let (words, rest) = key.as_chunks::<8>();
    for word in words {
        hash = mix(hash ^ u64::from_le_bytes(*word));
    }
    if !rest.is_empty() {
        let mut last = [0_u8; 8];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        hash = mix(hash ^ u64::from_le_bytes(last));
    }
    mix(hash)
}

fn mix(mut word: u64) -> u64 {
    word ^= word >> 33;
    word = word.wrapping_mul(0xff51_afd7_ed55_8ccd);
    word ^= word >> 33;
    word = word.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    word ^ (word >> 33)
}

/// The group of a key with this hash: its top eight bits. A record carries the upper half of the hash, so its group is
/// known without the key.
#[must_use]
pub fn key_group(hash: u64) -> usize {
    usize::from((hash >> 56) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fixed for ever: keys on disk and in flight depend on them. PROTOCOL.md has the same table.
    #[test]
    fn vectors() {
        let document = include_str!("../PROTOCOL.md");
        for key in ["", "a", "licence", "12345678", "123456789", "N708JB", "a rather longer key than one word"] {
            let row =
                format!("| `{key}` | `{:016x}` | {} |", hash_key(key.as_bytes()), key_group(hash_key(key.as_bytes())));
            assert!(document.contains(&row), "PROTOCOL.md has no row {row}");
        }
    }

    #[test]
    fn spreads_short_numbers_evenly() {
        let mut groups = [0_u32; KEY_GROUPS];
        for i in 0..256_000_u32 {
            groups[key_group(hash_key(i.to_string().as_bytes()))] += 1;
        }
        let fullest = groups.iter().max().copied().unwrap_or(0);
        assert!(fullest < 1200, "the fullest of 256 groups has {fullest} of 256,000 keys, the mean is 1,000");
    }
}
