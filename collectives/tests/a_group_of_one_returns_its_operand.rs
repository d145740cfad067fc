//! A model on one machine runs the same code: every operation of a group of one is the identity.

use mlx_rs::{Array, Dtype};
use offbook_collectives::Group;

#[test]
fn in_every_operation() {
    let group = Group::solo();
    assert_eq!((group.rank(), group.size()), (0, 1));
    let x = Array::from_slice(&[1.0f32, -2.0, 3.5, 0.0], &[2, 2]);
    for result in [
        group.all_sum(&x),
        group.all_max(&x),
        group.all_min(&x),
        group.all_gather(&x),
        group.sum_scatter(&x),
        group.broadcast(&x, 0),
        group
            .gather_to(&x, &[2], 0)
            .map(|gathered| gathered.into_root().unwrap()),
    ] {
        let result = result.unwrap();
        result.eval().unwrap();
        assert_eq!(result.shape(), x.shape());
        assert_eq!(result.as_slice::<f32>(), x.as_slice::<f32>());
    }
    assert!(group.send(&x, 0).is_err());
    assert!(group.recv(&[1], Dtype::Float32, 1).is_err());
    assert!(group.broadcast(&x, 1).is_err());
    assert!(group.gather_to(&x, &[3], 0).is_err());
    let handle = group.handle();
    assert_eq!((handle.health(), handle.operations()), (Ok(()), 0));
}
