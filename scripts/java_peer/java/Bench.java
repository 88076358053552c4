import com.scalar.db.api.DistributedTransaction;
import com.scalar.db.api.Insert;
import com.scalar.db.api.Result;
import com.scalar.db.io.Key;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.atomic.AtomicInteger;

/**
 * The benchmark's ScalarDB side: a number of threads run one kind of transaction for some seconds.
 *
 * <p>A transaction that meets a conflict waits and is run again with a new id, as {@code scripts/bench/transfers.py}
 * does it; its latency counts from its first begin.
 */
final class Bench {
  private Bench() {}

  static Object run(Peer.Manager manager, Map<String, Object> command) throws Exception {
    String namespace = (String) command.get("namespace");
    String work = (String) command.get("work");
    int keys = Peer.integer(command, "keys");
    long endsNs = System.nanoTime() + Peer.integer(command, "milliseconds") * 1_000_000L;
    AtomicInteger conflicts = new AtomicInteger();
    List<Long> latenciesUs = Collections.synchronizedList(new ArrayList<>());
    Throwable[] broken = new Throwable[1];
    Thread[] threads = new Thread[Peer.integer(command, "at_once")];
    long beganNs = System.nanoTime();
    for (int n = 0; n < threads.length; n++) {
      threads[n] =
          new Thread(
              () -> {
                try {
                  while (System.nanoTime() < endsNs) {
                    long startNs = System.nanoTime();
                    untilCommitted(manager, namespace, work, keys, conflicts);
                    latenciesUs.add((System.nanoTime() - startNs) / 1000);
                  }
                } catch (Throwable e) {
                  broken[0] = e;
                }
              });
      threads[n].setDaemon(true);
      threads[n].start();
    }
    for (Thread thread : threads) {
      thread.join();
    }
    long tookNs = System.nanoTime() - beganNs;
    if (broken[0] != null) {
      throw new IllegalStateException(broken[0]);
    }
    Map<String, Object> result = new LinkedHashMap<>();
    result.put("latencies_us", latenciesUs);
    result.put("conflicts", conflicts.get());
    result.put("took_us", tookNs / 1000);
    return result;
  }

  private static void untilCommitted(
      Peer.Manager manager, String namespace, String work, int keys, AtomicInteger conflicts) throws Exception {
    ThreadLocalRandom random = ThreadLocalRandom.current();
    int first = random.nextInt(keys);
    int second = (first + 1 + random.nextInt(keys - 1)) % keys;
    for (int attempt = 0; ; attempt++) {
      DistributedTransaction transaction = manager.transactions.begin();
      try {
        if (work.equals("transfer")) {
          transfer(transaction, namespace, first, second);
        } else {
          order(transaction, namespace, first, second);
        }
        transaction.commit();
        return;
      } catch (Exception e) {
        if (!Peer.isConflict(e)) {
          throw e;
        }
        Peer.abandon(transaction);
        conflicts.incrementAndGet();
        Thread.sleep((long) (10 * (1 << Math.min(attempt, 4)) * random.nextDouble(0.5, 1.5)));
      }
    }
  }

  private static void transfer(DistributedTransaction transaction, String namespace, int from, int to)
      throws Exception {
    Result held = Mix.read(transaction, namespace, "account", from);
    Result owed = Mix.read(transaction, namespace, "account", to);
    transaction.update(
        Mix.change(namespace, "account", from).bigIntValue("balance", held.getBigInt("balance") - 1).build());
    transaction.update(
        Mix.change(namespace, "account", to).bigIntValue("balance", owed.getBigInt("balance") + 1).build());
  }

  private static void order(DistributedTransaction transaction, String namespace, int product, int customer)
      throws Exception {
    Result stock = Mix.read(transaction, namespace, "stock", product);
    Result wallet = Mix.read(transaction, namespace, "wallet", customer);
    String id = UUID.randomUUID().toString();
    transaction.update(
        Mix.change(namespace, "stock", product).intValue("reserved", stock.getInt("reserved") + 1).build());
    transaction.update(
        Mix.change(namespace, "wallet", customer).bigIntValue("balance", wallet.getBigInt("balance") - 100).build());
    for (String table : Arrays.asList("shipment", "orders")) {
      transaction.insert(
          Insert.newBuilder()
              .namespace(namespace)
              .table(table)
              .partitionKey(Key.ofText("id", id))
              .intValue("customer", customer)
              .intValue("product", product)
              .textValue("status", "placed")
              .build());
    }
  }
}
