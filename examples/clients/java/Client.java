import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.StatusRuntimeException;
import java.util.concurrent.TimeUnit;
import octavo.common.v1.Common.SamplingParams;
import octavo.inference.v1.GenerationOuterClass.Chat;
import octavo.inference.v1.GenerationOuterClass.GenerateStreamRequest;
import octavo.inference.v1.GenerationOuterClass.Generation;
import octavo.inference.v1.GenerationOuterClass.Message;
import octavo.inference.v1.GenerationOuterClass.Part;
import octavo.inference.v1.GenerationServiceGrpc;

/** Streams one answer. java Client ADDRESS PROMPT */
public final class Client {
  public static void main(String[] args) throws InterruptedException {
    ManagedChannel channel = ManagedChannelBuilder.forTarget(args[0]).usePlaintext().build();
    Message message = Message.newBuilder().setRole("user").addParts(Part.newBuilder().setText(args[1])).build();
    Generation generation =
        Generation.newBuilder()
            .setModel("smollm2-135m-instruct")
            .setChat(Chat.newBuilder().addMessages(message))
            .setSampling(SamplingParams.newBuilder().setTemperature(0))
            .build();
    GenerateStreamRequest request = GenerateStreamRequest.newBuilder().setGeneration(generation).build();
    int status = 0;
    try {
      GenerationServiceGrpc.newBlockingStub(channel)
          .withDeadlineAfter(2, TimeUnit.MINUTES)
          .generateStream(request)
          .forEachRemaining(
              response -> {
                if (response.getEvent().hasDelta()) {
                  System.out.print(response.getEvent().getDelta().getText());
                }
                if (response.getEvent().hasCompleted()) {
                  int tokens = response.getEvent().getCompleted().getUsage().getOutputTokens();
                  System.out.printf("%n%d tokens%n", tokens);
                }
              });
    } catch (StatusRuntimeException error) {
      System.err.println(error.getStatus()); // StatusProto.fromThrowable(error) says what to change
      status = 1;
    }
    channel.shutdown().awaitTermination(5, TimeUnit.SECONDS);
    System.exit(status);
  }
}
