//! The same calls over MLX's own ring, one process per rank, as that is all that it allows.

mod support;

use mlx_rs::{Array, transforms::eval};
use offbook_collectives::{Group, RingSpec};

use support::{Place, processes, say};

#[test]
fn three_ranks_in_a_ring() {
    const NAME: &str = "three_ranks_in_a_ring";
    if let Some(place) = Place::of_this_process() {
        return be_a_rank(&place);
    }
    let mut ranks = processes(3, &["--exact", NAME, "--nocapture"], &[]);
    for rank in &mut ranks {
        assert_eq!(rank.says("done"), "3");
    }
}

fn be_a_rank(place: &Place) {
    let spec = RingSpec {
        rank: place.rank,
        addresses: place.ring_addresses(),
    };
    let group = Group::ring(&spec).unwrap();
    assert!(
        Group::ring(&spec).is_err(),
        "a second ring would be the first one again"
    );
    assert_eq!((group.rank(), group.size()), (place.rank, place.size));
    let own = group.rank() as f32;
    let x = Array::from_slice(&[own, 10.0 * own, 7.0], &[3]);

    is(&group.all_sum(&x).unwrap(), &[3.0, 30.0, 21.0]);
    is(&group.all_max(&x).unwrap(), &[2.0, 20.0, 7.0]);
    is(&group.all_min(&x).unwrap(), &[0.0, 0.0, 7.0]);
    is(
        &group.all_gather(&x).unwrap(),
        &[0.0, 0.0, 7.0, 1.0, 10.0, 7.0, 2.0, 20.0, 7.0],
    );
    is(&group.broadcast(&x, 1).unwrap(), &[1.0, 10.0, 7.0]);
    is(
        &group.sum_scatter(&x).unwrap(),
        &[[3.0], [30.0], [21.0]][group.rank()],
    );

    let token = Array::from_slice(&[group.rank() as i32 + 40], &[1]);
    let token = group.broadcast(&token, 2).unwrap();
    token.eval().unwrap();
    assert_eq!(token.as_slice::<i32>(), [42]);

    let rows = [2, 0, 1];
    let mine = vec![own; 2 * rows[group.rank()] as usize];
    let mine = Array::from_slice(&mine, &[rows[group.rank()], 2]);
    let gathered = group.gather_to(&mine, &rows, 0).unwrap();
    eval([gathered.pending()]).unwrap();
    if let Some(all) = gathered.into_root() {
        is(&all, &[0.0, 0.0, 0.0, 0.0, 2.0, 2.0]);
    }

    // To the right, one after the other: MLX's ring sends to neighbours only.
    if group.rank() == 0 {
        group.send(&x, 1).unwrap().eval().unwrap();
    } else if group.rank() == 1 {
        is(&group.recv(&[3], x.dtype(), 0).unwrap(), &[0.0, 0.0, 7.0]);
    }
    assert_eq!(group.handle().health(), Ok(()));
    say("done", group.size());
}

fn is(array: &Array, expected: &[f32]) {
    array.eval().unwrap();
    assert_eq!(array.as_slice::<f32>(), expected);
}
