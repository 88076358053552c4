import com.scalar.db.api.Delete;
import com.scalar.db.api.DeleteIf;
import com.scalar.db.api.DistributedStorage;
import com.scalar.db.api.DistributedStorageAdmin;
import com.scalar.db.api.DistributedStorageProvider;
import com.scalar.db.api.Mutation;
import com.scalar.db.api.Put;
import com.scalar.db.config.DatabaseConfig;
import com.scalar.db.storage.cassandra.CassandraProvider;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Proxy;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicLong;

/**
 * ScalarDB's Cassandra storage, with a look at what passes: counts statements by phase, and can hold
 * transactions at a phase, so that the process can be killed there. Named by {@code scalar.db.storage}.
 */
public final class WatchedCassandra implements DistributedStorageProvider {
  /** The property that names the watch of a manager's storage. */
  static final String WATCH = "peer.watch";

  private static final Map<String, Watch> watches = new ConcurrentHashMap<>();
  private final DistributedStorageProvider cassandra = new CassandraProvider();

  static Watch watch(String name) {
    return watches.computeIfAbsent(name, Watch::new);
  }

  @Override
  public String getName() {
    return "watched-cassandra";
  }

  @Override
  public DistributedStorageAdmin createDistributedStorageAdmin(DatabaseConfig config) {
    return cassandra.createDistributedStorageAdmin(config);
  }

  @Override
  public DistributedStorage createDistributedStorage(DatabaseConfig config) {
    DistributedStorage storage = cassandra.createDistributedStorage(config);
    Watch watch = watch(config.getProperties().getProperty(WATCH));
    return (DistributedStorage)
        Proxy.newProxyInstance(
            getClass().getClassLoader(),
            new Class<?>[] {DistributedStorage.class},
            (proxy, method, arguments) -> {
              if (arguments != null && arguments.length == 1) {
                watch.pass(method.getName(), arguments[0]);
              }
              try {
                return method.invoke(storage, arguments);
              } catch (InvocationTargetException e) {
                throw e.getCause();
              }
            });
  }

  /** What passes one manager's storage. */
  static final class Watch {
    private final String name;
    private final Map<String, AtomicLong> counts = new ConcurrentHashMap<>();
    private volatile String holdAt = "";
    private volatile CountDownLatch held = new CountDownLatch(0);

    private Watch(String name) {
      this.name = name;
    }

    /** From now on, whoever reaches {@code phase} stays there: until released, or until the process is killed. */
    void hold(String phase) {
      held = new CountDownLatch(1);
      holdAt = phase;
    }

    void release() {
      holdAt = "";
      held.countDown();
    }

    Map<String, Object> counts() {
      Map<String, Object> copy = new TreeMap<>();
      counts.forEach((phase, count) -> copy.put(phase, count.get()));
      return copy;
    }

    private void pass(String method, Object argument) throws InterruptedException {
      String phase = phase(method, argument);
      counts.computeIfAbsent(phase, key -> new AtomicLong()).incrementAndGet();
      if (phase.equals(holdAt)) {
        Peer.say(Map.of("event", "held", "manager", name, "at", phase));
        held.await();
      }
    }

    private static String phase(String method, Object argument) {
      if (method.equals("get") || method.equals("scan")) {
        return method;
      }
      List<?> all = argument instanceof List ? (List<?>) argument : Collections.singletonList(argument);
      if (all.isEmpty() || !(all.get(0) instanceof Mutation)) {
        return method;
      }
      Mutation mutation = (Mutation) all.get(0);
      if (mutation instanceof Delete) {
        boolean deleted =
            mutation.getCondition().orElse(null) instanceof DeleteIf
                && ((DeleteIf) mutation.getCondition().get())
                    .getExpressions().stream()
                        .anyMatch(e -> e.getName().equals("tx_state") && e.getColumn().getIntValue() == 2);
        return deleted ? "commit_records" : "rollback_records";
      }
      Put put = (Put) mutation;
      int state = put.getColumns().containsKey("tx_state") ? put.getColumns().get("tx_state").getIntValue() : 0;
      if (put.getColumns().containsKey("tx_created_at")) {
        return state == 3 ? "commit_state" : "abort_state";
      }
      if (state == 1 || state == 2) {
        return "prepare_records";
      }
      return put.getColumns().containsKey("tx_version") ? "rollback_records" : "commit_records";
    }
  }
}
