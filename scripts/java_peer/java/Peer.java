import com.scalar.db.api.Delete;
import com.scalar.db.api.DistributedTransaction;
import com.scalar.db.api.DistributedTransactionAdmin;
import com.scalar.db.api.DistributedTransactionManager;
import com.scalar.db.api.Get;
import com.scalar.db.api.GetWithIndex;
import com.scalar.db.api.Insert;
import com.scalar.db.api.Result;
import com.scalar.db.api.Scan;
import com.scalar.db.api.TableMetadata;
import com.scalar.db.api.Update;
import com.scalar.db.api.Upsert;
import com.scalar.db.exception.transaction.AbortException;
import com.scalar.db.exception.transaction.CommitConflictException;
import com.scalar.db.exception.transaction.CrudConflictException;
import com.scalar.db.exception.transaction.TransactionNotFoundException;
import com.scalar.db.exception.transaction.UnknownTransactionStatusException;
import com.scalar.db.io.BigIntColumn;
import com.scalar.db.io.BlobColumn;
import com.scalar.db.io.BooleanColumn;
import com.scalar.db.io.Column;
import com.scalar.db.io.DataType;
import com.scalar.db.io.DateColumn;
import com.scalar.db.io.DoubleColumn;
import com.scalar.db.io.FloatColumn;
import com.scalar.db.io.IntColumn;
import com.scalar.db.io.Key;
import com.scalar.db.io.TextColumn;
import com.scalar.db.io.TimeColumn;
import com.scalar.db.io.TimestampTZColumn;
import com.scalar.db.service.TransactionFactory;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.time.LocalDate;
import java.time.LocalTime;
import java.util.ArrayList;
import java.util.Base64;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Properties;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/**
 * A program on ScalarDB that does what it is told: one JSON object a line on standard input, any number of lines on
 * standard output. Every command carries {@code id} and {@code do}; its answer is the line with that {@code id} and
 * either {@code result} or {@code error}. Lines with {@code event} tell what happens meanwhile. Commands run side by
 * side, each in a thread of its own; the end of standard input ends the program.
 */
public final class Peer {
  private static final PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
  private static final Map<String, Manager> managers = new ConcurrentHashMap<>();

  private Peer() {}

  /** A transaction manager with its admin, under the name that commands call it by. */
  static final class Manager {
    final DistributedTransactionManager transactions;
    final DistributedTransactionAdmin admin;
    private final Map<String, TableMetadata> tables = new ConcurrentHashMap<>();

    Manager(Map<String, Object> settings) {
      Properties properties = new Properties();
      settings.forEach((name, value) -> properties.setProperty(name, String.valueOf(value)));
      TransactionFactory factory = TransactionFactory.create(properties);
      transactions = factory.getTransactionManager();
      admin = factory.getTransactionAdmin();
    }

    TableMetadata table(String fullName) throws Exception {
      TableMetadata known = tables.get(fullName);
      if (known == null) {
        String[] names = fullName.split("\\.");
        known = admin.getTableMetadata(names[0], names[1]);
        if (known == null) {
          throw new IllegalArgumentException("no table " + fullName);
        }
        tables.put(fullName, known);
      }
      return known;
    }
  }

  static void say(Map<String, ?> line) {
    String text = Json.write(line);
    synchronized (out) {
      out.println(text);
    }
  }

  public static void main(String[] arguments) throws Exception {
    ExecutorService threads =
        Executors.newCachedThreadPool(
            work -> {
              Thread thread = new Thread(work);
              thread.setDaemon(true);
              return thread;
            });
    say(Map.of("event", "ready", "now_ns", System.nanoTime()));
    BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String line = in.readLine(); line != null; line = in.readLine()) {
      Map<String, Object> command = Json.object(line);
      threads.execute(() -> answer(command));
    }
    System.exit(0);
  }

  private static void answer(Map<String, Object> command) {
    Map<String, Object> answer = new LinkedHashMap<>();
    answer.put("id", command.get("id"));
    try {
      answer.put("result", run(command));
    } catch (Throwable e) {
      answer.put("error", e.getClass().getSimpleName());
      answer.put("message", String.valueOf(e.getMessage()));
    }
    say(answer);
  }

  private static Object run(Map<String, Object> command) throws Exception {
    String what = (String) command.get("do");
    if (what.equals("open")) {
      managers.put((String) command.get("manager"), new Manager(map(command.get("properties"))));
      return null;
    }
    String name = (String) command.get("manager");
    Manager manager = managers.get(name);
    if (manager == null) {
      throw new IllegalArgumentException("no manager " + name);
    }
    switch (what) {
      case "close":
        managers.remove(name);
        manager.transactions.close();
        manager.admin.close();
        return null;
      case "hold":
        WatchedCassandra.watch(name).hold((String) command.get("at"));
        return null;
      case "release":
        WatchedCassandra.watch(name).release();
        return null;
      case "counts":
        return WatchedCassandra.watch(name).counts();
      case "create_coordinator_tables":
        manager.admin.createCoordinatorTables(true, options(command));
        return null;
      case "create_namespace":
        manager.admin.createNamespace((String) command.get("namespace"), true, options(command));
        return null;
      case "create_table":
        createTable(manager, command);
        return null;
      case "namespaces":
        return manager.admin.getNamespaceNames();
      case "table":
        return describe(manager.table((String) command.get("table")));
      case "state":
        return manager.transactions.getState((String) command.get("tx_id")).name();
      case "transaction":
        return transaction(manager, command);
      case "mix":
        return Mix.run(manager, command);
      case "stop":
        Mix.stop();
        return null;
      case "bench":
        return Bench.run(manager, command);
      default:
        throw new IllegalArgumentException("unknown command " + what);
    }
  }

  // -- tables

  private static Map<String, String> options(Map<String, Object> command) {
    Map<String, String> options = new LinkedHashMap<>();
    if (command.get("options") != null) {
      map(command.get("options")).forEach((name, value) -> options.put(name, String.valueOf(value)));
    }
    return options;
  }

  private static void createTable(Manager manager, Map<String, Object> command) throws Exception {
    TableMetadata.Builder builder = TableMetadata.newBuilder();
    map(command.get("columns")).forEach((name, type) -> builder.addColumn(name, DataType.valueOf((String) type)));
    list(command.get("partition_key")).forEach(name -> builder.addPartitionKey((String) name));
    List<Object> descending = list(command.get("descending"));
    for (Object name : list(command.get("clustering_key"))) {
      boolean down = descending.contains(name);
      builder.addClusteringKey((String) name, down ? Scan.Ordering.Order.DESC : Scan.Ordering.Order.ASC);
    }
    list(command.get("indexes")).forEach(name -> builder.addSecondaryIndex((String) name));
    manager.admin.createTable(
        (String) command.get("namespace"), (String) command.get("name"), builder.build(), true, options(command));
  }

  private static Map<String, Object> describe(TableMetadata table) {
    Map<String, Object> columns = new LinkedHashMap<>();
    table.getColumnDataTypes().forEach((name, type) -> columns.put(name, type.name()));
    Map<String, Object> orders = new LinkedHashMap<>();
    table.getClusteringOrders().forEach((name, order) -> orders.put(name, order.name()));
    Map<String, Object> described = new LinkedHashMap<>();
    described.put("columns", columns);
    described.put("partition_key", table.getPartitionKeyNames());
    described.put("clustering_key", orders);
    described.put("indexes", table.getSecondaryIndexNames());
    return described;
  }

  // -- one transaction, given as steps

  private static Object transaction(Manager manager, Map<String, Object> command) throws Exception {
    DistributedTransaction transaction = manager.transactions.begin();
    say(Map.of("event", "began", "id", command.get("id"), "tx_id", transaction.getId()));
    List<Object> results = new ArrayList<>();
    try {
      for (Object step : list(command.get("steps"))) {
        results.add(step(manager, transaction, map(step)));
      }
      transaction.commit();
    } catch (UnknownTransactionStatusException e) {
      throw e;
    } catch (Exception e) {
      transaction.rollback();
      throw e;
    }
    Map<String, Object> result = new LinkedHashMap<>();
    result.put("tx_id", transaction.getId());
    result.put("results", results);
    return result;
  }

  private static Object step(Manager manager, DistributedTransaction transaction, Map<String, Object> step)
      throws Exception {
    if (step.get("do").equals("wait")) {
      Thread.sleep(integer(step, "milliseconds"));
      return null;
    }
    String fullName = (String) step.get("table");
    TableMetadata table = manager.table(fullName);
    String[] names = fullName.split("\\.");
    String namespace = names[0];
    String name = names[1];
    if (step.get("do").equals("get_by_index")) {
      Key value = Key.newBuilder().add(column(table, (String) step.get("column"), step.get("value"))).build();
      Optional<Result> found =
          transaction.get(
              GetWithIndex.newBuilder().namespace(namespace).table(name).indexKey(value).build());
      return found.map(Peer::row).orElse(null);
    }
    Map<String, Object> keys = map(step.get("key"));
    Key partition = key(table, table.getPartitionKeyNames(), keys);
    Optional<Key> clustering =
        keys.keySet().containsAll(table.getClusteringKeyNames()) && !table.getClusteringKeyNames().isEmpty()
            ? Optional.of(key(table, table.getClusteringKeyNames(), keys))
            : Optional.empty();
    List<Column<?>> columns = new ArrayList<>();
    if (step.get("columns") != null) {
      for (Map.Entry<String, Object> entry : map(step.get("columns")).entrySet()) {
        columns.add(column(table, entry.getKey(), entry.getValue()));
      }
    }
    switch ((String) step.get("do")) {
      case "get":
        {
          return get(transaction, namespace, name, partition, clustering).map(Peer::row).orElse(null);
        }
      case "scan":
        {
          List<Object> rows = new ArrayList<>();
          for (Result result :
              transaction.scan(Scan.newBuilder().namespace(namespace).table(name).partitionKey(partition).build())) {
            rows.add(row(result));
          }
          return rows;
        }
      case "insert":
        {
          var insert = Insert.newBuilder().namespace(namespace).table(name).partitionKey(partition);
          clustering.ifPresent(insert::clusteringKey);
          columns.forEach(insert::value);
          transaction.insert(insert.build());
          return null;
        }
      case "upsert":
        {
          var upsert = Upsert.newBuilder().namespace(namespace).table(name).partitionKey(partition);
          clustering.ifPresent(upsert::clusteringKey);
          columns.forEach(upsert::value);
          transaction.upsert(upsert.build());
          return null;
        }
      case "update":
        {
          var update = Update.newBuilder().namespace(namespace).table(name).partitionKey(partition);
          clustering.ifPresent(update::clusteringKey);
          columns.forEach(update::value);
          transaction.update(update.build());
          return null;
        }
      case "delete":
        {
          var delete = Delete.newBuilder().namespace(namespace).table(name).partitionKey(partition);
          clustering.ifPresent(delete::clusteringKey);
          transaction.delete(delete.build());
          return null;
        }
      default:
        throw new IllegalArgumentException("unknown step " + step.get("do"));
    }
  }

  static Optional<Result> get(
      DistributedTransaction transaction, String namespace, String table, Key partition, Optional<Key> clustering)
      throws Exception {
    var get = Get.newBuilder().namespace(namespace).table(table).partitionKey(partition);
    clustering.ifPresent(get::clusteringKey);
    return transaction.get(get.build());
  }

  // -- values: numbers and booleans as they are, everything else as a string

  private static Key key(TableMetadata table, Iterable<String> names, Map<String, Object> values) {
    Key.Builder builder = Key.newBuilder();
    names.forEach(name -> builder.add(column(table, name, values.get(name))));
    return builder.build();
  }

  private static Column<?> column(TableMetadata table, String name, Object value) {
    String text = String.valueOf(value);
    boolean none = value == null;
    switch (table.getColumnDataType(name)) {
      case BOOLEAN:
        return none ? BooleanColumn.ofNull(name) : BooleanColumn.of(name, (Boolean) value);
      case INT:
        return none ? IntColumn.ofNull(name) : IntColumn.of(name, Integer.parseInt(text));
      case BIGINT:
        return none ? BigIntColumn.ofNull(name) : BigIntColumn.of(name, Long.parseLong(text));
      case FLOAT:
        return none ? FloatColumn.ofNull(name) : FloatColumn.of(name, Float.parseFloat(text));
      case DOUBLE:
        return none ? DoubleColumn.ofNull(name) : DoubleColumn.of(name, Double.parseDouble(text));
      case TEXT:
        return none ? TextColumn.ofNull(name) : TextColumn.of(name, text);
      case BLOB:
        return none ? BlobColumn.ofNull(name) : BlobColumn.of(name, Base64.getDecoder().decode(text));
      case DATE:
        return none ? DateColumn.ofNull(name) : DateColumn.of(name, LocalDate.parse(text));
      case TIME:
        return none ? TimeColumn.ofNull(name) : TimeColumn.of(name, LocalTime.parse(text));
      case TIMESTAMPTZ:
        return none ? TimestampTZColumn.ofNull(name) : TimestampTZColumn.of(name, Instant.parse(text));
      default:
        throw new IllegalArgumentException("no values of this type here: " + name);
    }
  }

  private static Map<String, Object> row(Result result) {
    Map<String, Object> row = new LinkedHashMap<>();
    result.getColumns().forEach((name, column) -> row.put(name, value(column)));
    return row;
  }

  private static Object value(Column<?> column) {
    if (column.hasNullValue()) {
      return null;
    }
    switch (column.getDataType()) {
      case BOOLEAN:
        return column.getBooleanValue();
      case INT:
        return column.getIntValue();
      case BIGINT:
        return column.getBigIntValue();
      case FLOAT:
        return Double.toString(column.getFloatValue());
      case BLOB:
        return Base64.getEncoder().encodeToString(column.getBlobValueAsBytes());
      default:
        return String.valueOf(column.getValueAsObject());
    }
  }

  // -- shared with the loads

  /** Whether a transaction that met {@code e} took no effect and may be run again from its start. */
  static boolean isConflict(Exception e) {
    return e instanceof CrudConflictException
        || e instanceof CommitConflictException
        || e instanceof TransactionNotFoundException;
  }

  static void abandon(DistributedTransaction transaction) {
    try {
      transaction.abort();
    } catch (AbortException e) {
      System.err.println("abort: " + e);
    }
  }

  @SuppressWarnings("unchecked")
  static Map<String, Object> map(Object value) {
    return (Map<String, Object>) value;
  }

  @SuppressWarnings("unchecked")
  static List<Object> list(Object value) {
    return value == null ? Collections.emptyList() : (List<Object>) value;
  }

  static int integer(Map<String, Object> command, String name) {
    return ((Number) command.get(name)).intValue();
  }
}
