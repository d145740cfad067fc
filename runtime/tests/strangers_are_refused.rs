//! Only processes of this cluster get in, each under its own name, and each is told why it does not.

mod support;

use std::sync::Arc;

use offbook_runtime::*;
use support::*;

/// What a dialler at `a` with this configuration hears from `b`.
async fn refusal(cluster: &Cluster, a: SystemConfig) -> HandshakeError {
    let b = cluster.start("b").await;
    Subject::new().register(&b, "subject");
    let a = System::start(a).await.unwrap();
    a.learn(b.process().clone(), b.local_addr());
    match a
        .remote::<Echo>(&path("b#subject"))
        .ask(Echo(vec![]), LONG)
        .await
    {
        Err(AskError::Unreachable { source, .. }) => source,
        other => panic!("it got in: {other:?}"),
    }
}

#[actix::test]
async fn a_key_that_the_other_side_does_not_pin() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        // A new key, and a cluster file of its own that pins it.
        config.identity = Arc::new(Identity::generate("a").unwrap());
        config.trust.nodes[0].keys = vec![config.identity.key()];
        assert_eq!(refusal(&cluster, config).await, HandshakeError::KeyRefused);
    })
    .await;
}

#[actix::test]
async fn a_key_that_this_side_does_not_pin() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        config.trust.nodes[1].keys = vec![Identity::generate("b").unwrap().key()];
        assert_eq!(refusal(&cluster, config).await, HandshakeError::UnknownKey);
    })
    .await;
}

#[actix::test]
async fn one_of_two_pinned_keys_is_enough() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        config.trust.nodes[1]
            .keys
            .insert(0, Identity::generate("b").unwrap().key());
        let a = System::start(config).await.unwrap();
        let b = cluster.start("b").await;
        Subject::new().register(&b, "subject");
        a.learn(b.process().clone(), b.local_addr());
        a.remote::<Echo>(&path("b#subject"))
            .ask(Echo(vec![]), LONG)
            .await
            .unwrap();
    })
    .await;
}

#[actix::test]
async fn a_name_that_the_key_is_not_pinned_for() {
    within(async {
        let cluster = Cluster::new(&["a", "b", "c"]);
        let mut config = cluster.config("a");
        // c's own cluster file says that its key is good for a.
        config.identity = cluster.config("c").identity;
        config.trust.nodes[0].keys.push(config.identity.key());
        assert!(matches!(
            refusal(&cluster, config).await,
            HandshakeError::Name(_)
        ));
    })
    .await;
}

#[actix::test]
async fn another_cluster() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        config.trust.cluster = "other".into();
        assert!(matches!(
            refusal(&cluster, config).await,
            HandshakeError::Cluster(_)
        ));
    })
    .await;
}

#[actix::test]
async fn another_configuration() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        config.trust.config_hash = 8;
        assert!(matches!(
            refusal(&cluster, config).await,
            HandshakeError::ConfigHash(_)
        ));
    })
    .await;
}

#[actix::test]
async fn an_address_where_another_process_lives() {
    within(async {
        let cluster = Cluster::new(&["a", "b", "c"]);
        let (a, c) = (cluster.start("a").await, cluster.start("c").await);
        a.learn(name("b"), c.local_addr());
        let error = a
            .remote::<Echo>(&path("b#any"))
            .ask(Echo(vec![]), LONG)
            .await
            .unwrap_err();
        let AskError::Unreachable { source, .. } = error else {
            panic!("{error}")
        };
        // The key alone gives it away, before a hello is sent.
        assert!(matches!(source, HandshakeError::Name(_)), "{source}");

        a.learn(name("c/worker-0"), c.local_addr());
        let child = a.remote::<Echo>(&path("c/worker-0#any"));
        let error = child.ask(Echo(vec![]), LONG).await.unwrap_err();
        let AskError::Unreachable { source, .. } = error else {
            panic!("{error}")
        };
        assert!(
            matches!(source, HandshakeError::WrongProcess(_)),
            "{source}"
        );
    })
    .await;
}

#[actix::test]
async fn an_incarnation_that_was_replaced() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let b = cluster.start("b").await;
        Subject::new().register(&b, "subject");
        let incarnation = |boot| {
            let mut config = cluster.config("a");
            config.boot = boot;
            let b = (b.process().clone(), b.local_addr());
            async move {
                let a = System::start(config).await.unwrap();
                a.learn(b.0, b.1);
                a
            }
        };
        let old = incarnation(1).await;
        let echo = |a: &System| a.remote::<Echo>(&path("b#subject"));
        echo(&old).ask(Echo(vec![]), LONG).await.unwrap();
        let (seen, left) = (b.watch(&name("a")), old.watch(&name("b")));
        let new = incarnation(2).await;
        echo(&new).ask(Echo(vec![]), LONG).await.unwrap();
        assert_eq!(seen.await.reason, LostReason::Restarted { boot: 2 });
        left.await;
        let error = echo(&old).ask(Echo(vec![]), LONG).await.unwrap_err();
        let AskError::Unreachable { source, .. } = error else {
            panic!("{error}")
        };
        assert!(matches!(source, HandshakeError::StaleBoot(_)), "{source}");
        echo(&new).ask(Echo(vec![]), LONG).await.unwrap();
    })
    .await;
}

#[actix::test]
async fn a_process_that_its_peers_would_refuse_does_not_start() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        config.identity = Arc::new(Identity::generate("a").unwrap());
        assert!(matches!(
            System::start(config).await,
            Err(StartError::NotPinned { .. })
        ));
        let mut config = cluster.config("a");
        config.limits.mailbox_max = 0;
        assert!(matches!(
            System::start(config).await,
            Err(StartError::Limits(_))
        ));
    })
    .await;
}
