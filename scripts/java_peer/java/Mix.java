import com.scalar.db.api.DistributedTransaction;
import com.scalar.db.api.Result;
import com.scalar.db.api.Update;
import com.scalar.db.exception.transaction.TransactionException;
import com.scalar.db.exception.transaction.UnknownTransactionStatusException;
import com.scalar.db.io.Key;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Random;
import java.util.concurrent.atomic.AtomicInteger;

/**
 * Random transfers, appends to lists, and looks at everything, until stopped, told line by line.
 *
 * <p>{@code python_peer.py} does the same in Python, from the same command: accounts {@code (id INT, balance BIGINT,
 * token INT)}, lists {@code (id INT, items TEXT)}. A token is written once and tells whose write it is. Before each
 * commit an event {@code trying} says what was read and written, in order, and of all accounts the {@code total} if it
 * read them all; after it, {@code tried} says how it came out. Times are of the machine's monotonic clock.
 */
final class Mix {
  private static volatile boolean stopping;

  private Mix() {}

  static void stop() {
    stopping = true;
  }

  static Object run(Peer.Manager manager, Map<String, Object> command) throws Exception {
    stopping = false;
    AtomicInteger tokens = new AtomicInteger(Peer.integer(command, "tokens_above"));
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
    Long total = null;
    List<Object> operations = new ArrayList<>();
    String outcome = "committed";
    try {
      int kind = random.nextInt(10);
      if (kind < 4) {
        int from = random.nextInt(accounts);
        int to = (from + 1 + random.nextInt(accounts - 1)) % accounts;
        long amount = 1 + random.nextInt(9);
        Result held = readAccount(transaction, namespace, from, operations);
        Result owed = readAccount(transaction, namespace, to, operations);
        writeAccount(transaction, namespace, from, held.getBigInt("balance") - amount, tokens, operations);
        writeAccount(transaction, namespace, to, owed.getBigInt("balance") + amount, tokens, operations);
      } else if (kind < 9) {
        int first = random.nextInt(lists);
        int second = (first + 1 + random.nextInt(lists - 1)) % lists;
        append(transaction, namespace, first, readList(transaction, namespace, first, operations), tokens, operations);
        String items = readList(transaction, namespace, second, operations);
        if (kind < 6) {
          append(transaction, namespace, second, items, tokens, operations);
        } else if (kind == 6) {
          readAccount(transaction, namespace, random.nextInt(accounts), operations);
        }
      } else {
        long sum = 0;
        for (int id = 0; id < accounts; id++) {
          sum += readAccount(transaction, namespace, id, operations).getBigInt("balance");
        }
        readList(transaction, namespace, random.nextInt(lists), operations);
        total = sum;
      }
      Map<String, Object> trying = new LinkedHashMap<>();
      trying.put("event", "trying");
      trying.put("tx_id", transaction.getId());
      trying.put("began_ns", beganNs);
      trying.put("operations", operations);
      trying.put("total", total);
      Peer.say(trying);
      transaction.commit();
    } catch (UnknownTransactionStatusException e) {
      outcome = "unknown";
    } catch (TransactionException e) {
      Peer.abandon(transaction);
      outcome = Peer.isConflict(e) ? "conflict" : "failed";
    }
    Map<String, Object> tried = new LinkedHashMap<>();
    tried.put("event", "tried");
    tried.put("tx_id", transaction.getId());
    tried.put("ended_ns", System.nanoTime());
    tried.put("outcome", outcome);
    Peer.say(tried);
    if (!outcome.equals("committed")) {
      conflicts.incrementAndGet();
      Thread.sleep(5 + random.nextInt(20));
    }
  }

  private static Result readAccount(
      DistributedTransaction transaction, String namespace, int id, List<Object> operations) throws Exception {
    Result account = read(transaction, namespace, "account", id);
    operations.add(Arrays.asList("read", "account", id, account.isNull("token") ? null : account.getInt("token")));
    return account;
  }

  private static void writeAccount(
      DistributedTransaction transaction,
      String namespace,
      int id,
      long balance,
      AtomicInteger tokens,
      List<Object> operations)
      throws Exception {
    int token = tokens.incrementAndGet();
    transaction.update(
        change(namespace, "account", id).bigIntValue("balance", balance).intValue("token", token).build());
    operations.add(Arrays.asList("write", "account", id, token));
  }

  private static String readList(
      DistributedTransaction transaction, String namespace, int id, List<Object> operations) throws Exception {
    String items = read(transaction, namespace, "list", id).getText("items");
    operations.add(Arrays.asList("read", "list", id, items));
    return items;
  }

  private static void append(
      DistributedTransaction transaction,
      String namespace,
      int id,
      String items,
      AtomicInteger tokens,
      List<Object> operations)
      throws Exception {
    int token = tokens.incrementAndGet();
    String longer = items.isEmpty() ? String.valueOf(token) : items + "," + token;
    transaction.update(change(namespace, "list", id).textValue("items", longer).build());
    operations.add(Arrays.asList("append", "list", id, token));
  }

  static Result read(DistributedTransaction transaction, String namespace, String table, int id) throws Exception {
    return Peer.get(transaction, namespace, table, Key.ofInt("id", id), Optional.empty()).get();
  }

  static com.scalar.db.api.UpdateBuilder.Buildable change(String namespace, String table, int id) {
    return Update.newBuilder().namespace(namespace).table(table).partitionKey(Key.ofInt("id", id));
  }
}
