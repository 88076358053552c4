import com.scalar.db.api.DistributedTransaction;
import com.scalar.db.api.Result;
import com.scalar.db.api.Update;
import com.scalar.db.exception.transaction.UnknownTransactionStatusException;
import com.scalar.db.io.Key;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Random;
import java.util.Set;
import java.util.concurrent.atomic.AtomicInteger;

/**
 * Random transfers, appends to lists and reads of lists, until stopped, told line by line.
 *
 * <p>{@code python_peer.py} does the same in Python, from the same command: accounts {@code (id INT, balance BIGINT)},
 * lists {@code (id INT, items TEXT)} of tokens that are used once. Before each commit an event {@code trying} says what
 * was read and written, after it {@code tried} says how it came out, with times of the machine's monotonic clock.
 */
final class Mix {
  private static volatile boolean stopping;

  private Mix() {}

  static void stop() {
    stopping = true;
  }

  static Object run(Peer.Manager manager, Map<String, Object> command) throws Exception {
    stopping = false;
    AtomicInteger tokens = new AtomicInteger();
    AtomicInteger conflicts = new AtomicInteger();
    Thread[] threads = new Thread[Peer.integer(command, "at_once")];
    Throwable[] broken = new Throwable[1];
    for (int n = 0; n < threads.length; n++) {
      Random random = new Random(Peer.integer(command, "seed") * 1000L + n);
      threads[n] =
          new Thread(
              () -> {
                try {
                  while (!stopping) {
                    one(manager, command, random, tokens, conflicts);
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
    if (broken[0] != null) {
      throw new IllegalStateException(broken[0]);
    }
    return Map.of("conflicts", conflicts.get());
  }

  private static void one(
      Peer.Manager manager, Map<String, Object> command, Random random, AtomicInteger tokens, AtomicInteger conflicts)
      throws Exception {
    String namespace = (String) command.get("namespace");
    int accounts = Peer.integer(command, "accounts");
    int lists = Peer.integer(command, "lists");
    long beganNs = System.nanoTime();
    DistributedTransaction transaction = manager.transactions.begin();
    Map<String, Object> did = new LinkedHashMap<>();
    did.put("event", "trying");
    did.put("tx_id", transaction.getId());
    did.put("began_ns", beganNs);
    String outcome = "committed";
    try {
      int kind = random.nextInt(10);
      if (kind < 4) {
        int from = random.nextInt(accounts);
        int to = (from + 1 + random.nextInt(accounts - 1)) % accounts;
        long amount = 1 + random.nextInt(9);
        long held = read(transaction, namespace, "account", from).getBigInt("balance");
        long owed = read(transaction, namespace, "account", to).getBigInt("balance");
        transaction.update(change(namespace, "account", from).bigIntValue("balance", held - amount).build());
        transaction.update(change(namespace, "account", to).bigIntValue("balance", owed + amount).build());
        did.put("transfer", List.of(from, to, amount));
      } else {
        Set<Integer> ids = new LinkedHashSet<>();
        while (ids.size() < 2) {
          ids.add(random.nextInt(lists));
        }
        Map<String, Object> reads = new LinkedHashMap<>();
        Map<String, Object> appends = new LinkedHashMap<>();
        int left = kind < 7 ? 1 : kind < 9 ? 2 : 0;
        for (int id : ids) {
          String items = read(transaction, namespace, "list", id).getText("items");
          reads.put(String.valueOf(id), items);
          if (left-- > 0) {
            String token = command.get("name") + "-" + tokens.incrementAndGet();
            appends.put(String.valueOf(id), token);
            String longer = items.isEmpty() ? token : items + "," + token;
            transaction.update(change(namespace, "list", id).textValue("items", longer).build());
          }
        }
        did.put("reads", reads);
        did.put("appends", appends);
      }
      Peer.say(did);
      transaction.commit();
    } catch (UnknownTransactionStatusException e) {
      outcome = "unknown";
    } catch (Exception e) {
      if (!Peer.isConflict(e)) {
        throw e;
      }
      Peer.abandon(transaction);
      outcome = "conflict";
    }
    Map<String, Object> tried = new LinkedHashMap<>();
    tried.put("event", "tried");
    tried.put("tx_id", transaction.getId());
    tried.put("ended_ns", System.nanoTime());
    tried.put("outcome", outcome);
    Peer.say(tried);
    if (outcome.equals("conflict")) {
      conflicts.incrementAndGet();
      Thread.sleep(5 + random.nextInt(20));
    }
  }

  static Result read(DistributedTransaction transaction, String namespace, String table, int id) throws Exception {
    return Peer.get(transaction, namespace, table, Key.ofInt("id", id), Optional.empty()).get();
  }

  static com.scalar.db.api.UpdateBuilder.Buildable change(String namespace, String table, int id) {
    return Update.newBuilder().namespace(namespace).table(table).partitionKey(Key.ofInt("id", id));
  }
}
