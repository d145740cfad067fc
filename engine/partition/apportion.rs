//! Whole units dealt out by weight: the largest-remainder method (Hamilton's).

use std::ops::Range;

/// Deals `units` out in proportion to `weights`, which are not negative and not all zero. Every
/// rank gets its quota rounded down; what is left goes to the largest remainders, and to the lower
/// rank where these are equal. The result sums to `units`.
pub(super) fn apportion(units: usize, weights: &[f64]) -> Vec<usize> {
    let sum: f64 = weights.iter().sum();
    let quotas: Vec<f64> = weights.iter().map(|w| units as f64 * (w / sum)).collect();
    let mut counts: Vec<usize> = quotas.iter().map(|quota| *quota as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    let remainder = |rank: usize| quotas[rank] - quotas[rank].floor();
    // A stable sort: equal remainders stay in rank order.
    order.sort_by(|a, b| remainder(*b).total_cmp(&remainder(*a)));
    let left = units.saturating_sub(counts.iter().sum());
    for rank in order.into_iter().cycle().take(left) {
        counts[rank] += 1;
    }
    counts
}

/// Deals `units` out so that each rank comes as near as it can to its weight's part of `whole`,
/// given what it has `held` before. Who holds more than its part gets nothing.
pub(super) fn fill(units: usize, weights: &[f64], held: &[f64], whole: f64) -> Vec<usize> {
    let deficits: Vec<f64> = weights
        .iter()
        .zip(held)
        .map(|(weight, held)| (weight * whole - held).max(0.0))
        .collect();
    if deficits.iter().sum::<f64>() > 0.0 {
        apportion(units, &deficits)
    } else {
        apportion(units, weights)
    }
}

/// Neighbouring ranges, `count` units long each.
pub(super) fn ranges(counts: &[usize], unit: usize) -> Vec<Range<usize>> {
    let mut start = 0;
    counts
        .iter()
        .map(|count| {
            let range = start..start + count * unit;
            start = range.end;
            range
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_weights_give_the_lower_ranks_the_rest() {
        assert_eq!(apportion(8, &[1.0; 3]), [3, 3, 2]);
        assert_eq!(apportion(2, &[1.0; 5]), [1, 1, 0, 0, 0]);
        assert_eq!(apportion(0, &[1.0; 2]), [0, 0]);
    }

    #[test]
    fn weights_are_followed() {
        assert_eq!(apportion(24, &[96.0, 64.0, 32.0]), [12, 8, 4]);
        assert_eq!(apportion(10, &[1e-300, 1.0]), [0, 10]);
    }

    #[test]
    fn what_was_held_before_counts() {
        assert_eq!(fill(6, &[0.5, 0.5], &[4.0, 0.0], 10.0), [1, 5]);
        assert_eq!(fill(4, &[0.5, 0.5], &[9.0, 9.0], 4.0), [2, 2]);
    }
}
